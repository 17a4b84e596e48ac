"""The sequential target against a least-squares problem over tokens."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from layer_problem import IN, effective, problem, statistics
from loftq.methods import METHODS, LayerProblem, Method
from loftq.methods.target import sequential_target


def tokens(n: int = 500) -> tuple[Tensor, Tensor]:
    """(x, x_hat) of one layer, (tokens, IN) float64: scaled, turned a little, and noisy."""
    g = torch.Generator().manual_seed(3)
    x = torch.randn(n, IN, generator=g).double() * torch.logspace(-1, 1, IN)
    turn = 0.9 * torch.eye(IN) + 0.02 * torch.randn(IN, IN, generator=g)
    return x, x @ turn.double() + 0.1 * torch.randn(n, IN, generator=g)


def drifted() -> tuple[LayerProblem, Tensor, Tensor]:
    x, x_hat = tokens()
    H, D = (y.mT @ x_hat / len(x) for y in (x_hat, x - x_hat))
    known = replace(statistics(n=1), gram=H[None].float(), drift=D[None].float())
    return problem(n=1, known=known, name="int2-g64-f32", fit="mse"), x, x_hat


def test_all_of_the_way_is_the_least_squares_weight() -> None:
    case, x, x_hat = drifted()
    W = case.weights[0].double()
    expected = torch.linalg.lstsq(x_hat, x @ W.mT).solution.mT
    found = sequential_target(case, blend=1.0, damping=1e-9)[0].double()
    assert (found - expected).norm() < 1e-3 * expected.norm()
    assert (expected - W).norm() > 0.05 * W.norm()


def test_a_blend_goes_part_of_the_way_and_damping_shortens_it() -> None:
    case, _, _ = drifted()
    none, half, whole = (sequential_target(case, blend=a, damping=0.01) for a in (0.0, 0.5, 1.0))
    assert torch.equal(none, case.weights)
    torch.testing.assert_close(half, (none + whole) / 2)
    damped = sequential_target(case, blend=1.0, damping=1.0)
    assert (damped - none).norm() < 0.5 * (whole - none).norm()


def test_a_worked_case() -> None:
    """One input that arrives at half its size: the weight has to double."""
    case = problem(n=1)
    known = replace(
        statistics(n=1),
        gram=torch.full((1, 1, 1), 0.25),
        drift=torch.full((1, 1, 1), 0.25),
    )
    case = replace(case, weights=torch.full((1, 1, 1), 3.0), statistics=known)
    assert sequential_target(case, blend=1.0, damping=0.0).item() == pytest.approx(6.0)


def test_best_gives_outputs_nearer_to_the_originals_than_fast() -> None:
    """E ||W x - (Q + B A) x_hat||^2, over the tokens themselves."""
    case, x, x_hat = drifted()
    wanted, errors = x @ case.weights[0].double().mT, {}
    for name, method in {
        "fast": METHODS["fast"],
        "best": METHODS["best"].with_options(blend=1.0),
    }.items():
        found = x_hat @ effective(method.solve(case), 1.0).double().mT
        errors[name] = ((found - wanted).norm() / wanted.norm()).item()
    assert errors["best"] < 0.8 * errors["fast"]


def test_a_weight_that_is_rounded_itself_leaves_the_drift_to_the_adapter() -> None:
    """Its Q stays by W; Q + B A goes for W* all the same, if not as far as where both do."""
    case, x, x_hat = drifted()
    W = case.weights[0].double()
    wanted, outputs, backbones = x @ W.mT, {}, {}
    for rounded in ("target", "weight"):
        found = METHODS["best"].with_options(rounded=rounded).solve(case)
        outputs[rounded] = (x_hat @ effective(found, 1.0).double().mT - wanted).norm()
        Q = found.quantized[0].dequantize().double()
        backbones[rounded] = (x_hat @ (Q - W).mT).norm()
    plain = x_hat @ effective(METHODS["fast"].solve(case), 1.0).double().mT - wanted
    assert backbones["weight"] < backbones["target"]
    assert outputs["target"] < outputs["weight"] < plain.norm()


def test_a_schedule_that_knows_one_weight_alone_takes_no_other_to_round() -> None:
    with pytest.raises(AssertionError, match="cloq: rounded"):
        METHODS["cloq"].with_options(rounded="weight")


def test_where_nothing_has_drifted_best_is_its_symmetric_self() -> None:
    known = replace(statistics(), drift=torch.zeros(2, IN, IN))
    case = problem(known=known, name="int2-g64-dq", fit="mse")
    best = METHODS["best"].solve(case)
    other = METHODS["best"].with_options(target="symmetric").solve(case)
    for i in range(2):
        assert torch.equal(best.quantized[i].weight_packed, other.quantized[i].weight_packed)
        assert torch.equal(effective(best, 1.0, i), effective(other, 1.0, i))


def test_statistics_of_the_original_model_alone_are_refused() -> None:
    known = replace(statistics(), drift=None)
    with pytest.raises(ValueError, match="layer0: this method takes statistics in sequence"):
        METHODS["best"].solve(problem(known=known))
    with pytest.raises(AssertionError, match="mine: needs"):
        Method(name="mine", paper="", summary="", target="sequential")
