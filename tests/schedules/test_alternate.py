import pytest
import torch

from loftq.formats import parse_format
from loftq.lowrank import ExactSolver, best_correction
from loftq.rounding import round_to_nearest
from loftq.schedules import alternate

SPEC = parse_format("nf2-g64-f32")


def weights(n=2, seed=0):
    return torch.randn(n, 96, 128, generator=torch.Generator().manual_seed(seed))


def quantize(target):
    return round_to_nearest(target, SPEC, fit="absmax")


def run(W, iterations, **options):
    return alternate(W, quantize=quantize, solver=ExactSolver(8), iterations=iterations, **options)


def test_one_step_is_qloras_rounding_plus_one_svd():
    W = weights()
    found = run(W, 1)
    rounded, values = quantize(W)
    assert torch.equal(found.rounded.codes, rounded.codes)
    for i in range(len(W)):
        expected = best_correction(W[i] - values[i], 8).product()
        assert torch.allclose(found.low_rank.product()[i], expected, atol=1e-5)


@pytest.mark.parametrize("order", ["quantize-first", "correct-first"])
def test_the_weight_stays_as_it_is(order):
    W = weights()
    run(W, 3, order=order)
    assert torch.equal(W, weights())


def test_no_step_is_plain_rounding():
    found = run(weights(), 0)
    assert found.low_rank is None
    assert found.errors.shape == (0, 2)
    assert found.kept.tolist() == [0, 0]


def test_recorded_error_is_that_of_the_kept_iterate():
    W = weights(4)
    found = run(W, 10)
    residual = W - found.rounded.decode() - found.low_rank.product()
    error = residual.flatten(1).norm(dim=1) / W.flatten(1).norm(dim=1)
    kept = found.errors[found.kept - 1, torch.arange(4)]
    assert torch.allclose(error.double(), kept, rtol=1e-5)
    assert torch.equal(kept, found.errors.amin(0))


def test_last_keeps_the_last_even_when_it_is_worse():
    W = torch.randn(1, 768, 768, generator=torch.Generator().manual_seed(0))
    solver = {"quantize": quantize, "iterations": 10}
    last = alternate(W, solver=ExactSolver(32), keep="last", **solver)
    best = alternate(W, solver=ExactSolver(32), keep="best", **solver)
    assert last.kept.item() == 10
    assert best.kept.item() < 10
    assert last.errors[-1] > best.errors.amin()


def test_correct_first_starts_from_the_leading_part_of_the_weight():
    W = weights(1)
    found = run(W, 1, order="correct-first")
    leading = best_correction(W[0], 8).product()
    assert torch.allclose(found.low_rank.product()[0], leading, atol=1e-5)
    rounded, _ = quantize(W - leading)
    assert torch.equal(found.rounded.codes, rounded.codes)


def test_weights_of_a_stack_do_not_influence_each_other():
    W = weights(3)
    together = run(W, 4)
    for i in range(3):
        alone = run(W[i : i + 1], 4)
        assert torch.equal(alone.rounded.codes[0], together.rounded.codes[i])


def test_unknown_order_is_refused():
    with pytest.raises(ValueError, match="order='svd-first'"):
        run(weights(), 1, order="svd-first")
