import math

import pytest
import torch

from layer_problem import effective, problem, statistics
from loftq.formats.entropy import most_informative
from loftq.methods import METHODS, find_method
from loftq.methods.base import relative_error
from loftq.rounding import round_to_nearest

CALIBRATED = tuple(name for name, row in METHODS.items() if row.needs != "none")


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("scaling", [1.0, 0.25, 2.0, 16 / math.sqrt(8)])
def test_record_is_the_error_of_what_is_stored(name, scaling):
    case = problem(scaling, known=statistics() if name in CALIBRATED else None)
    solution = METHODS[name].solve(case)
    for i, record in enumerate(solution.records):
        difference = (case.weights[i] - effective(solution, scaling, i)).double().norm()
        expected = difference / case.weights[i].double().norm()
        assert record.error == pytest.approx(expected.item(), rel=1e-6)


@pytest.mark.parametrize("name", ["loftq", "loftq-paper", "qpissa", *CALIBRATED])
@pytest.mark.parametrize("scaling", [0.25, 2.0, 5.66])
def test_effective_start_is_the_same_for_every_alpha(name, scaling):
    known = statistics() if name in CALIBRATED else None
    plain = METHODS[name].solve(problem(known=known))
    scaled = METHODS[name].solve(problem(scaling, known=known))
    for i in range(2):
        assert torch.equal(plain.quantized[i].weight_packed, scaled.quantized[i].weight_packed)
        assert torch.allclose(effective(plain, 1.0, i), effective(scaled, scaling, i), atol=1e-5)


def test_qlora_starts_at_plain_rounding_with_a_zero_product():
    solution = METHODS["qlora"].solve(problem())
    assert not solution.lora_B.any()
    assert solution.lora_A.any()
    assert solution.records[0].error == pytest.approx(solution.records[0].plain_error, rel=1e-6)
    bound = 1 / math.sqrt(128)
    assert solution.lora_A.abs().max() <= bound
    assert solution.lora_A.std().item() == pytest.approx(bound / math.sqrt(3), rel=0.05)


def test_qlora_is_loftq_without_iterations():
    qlora = METHODS["qlora"].solve(problem())
    none = METHODS["loftq"].with_options(iterations=0).solve(problem())
    assert torch.equal(qlora.lora_A, none.lora_A)
    assert torch.equal(qlora.quantized[0].weight_packed, none.quantized[0].weight_packed)


def test_ir_qlora_is_qlora_under_the_zeros_of_largest_entropy():
    case = problem(fit="entropy", name="int2-g64-dq")
    found, plain = METHODS["ir-qlora"].solve(case), METHODS["qlora"].solve(case)
    rounded, _ = round_to_nearest(case.weights, case.spec, fit="entropy")
    groups = case.weights.flatten(0, 1).unflatten(-1, (-1, 64)).flatten(0, 1)
    assert torch.equal(rounded.zeros.flatten(), most_informative(groups, 3)[1])
    for i in range(2):
        assert torch.equal(found.quantized[i].weight_packed, rounded.pack(i).weight_packed)
        assert torch.equal(found.quantized[i].weight_zero, rounded.pack(i).weight_zero)
        assert torch.equal(found.quantized[i].weight_packed, plain.quantized[i].weight_packed)
    assert not found.lora_B.any()


def test_paper_and_ours_agree_where_they_should():
    """Same format, fit and T: only the solver and the kept iterate differ."""
    case = problem(name="nf4-g64-f32")
    paper = METHODS["loftq-paper"].solve(case)
    ours = METHODS["loftq"].solve(case)
    for a, b in zip(paper.records, ours.records, strict=True):
        assert b.error == pytest.approx(a.error, rel=2e-3)


def test_each_method_improves_on_rounding():
    for name in ("loftq", "loftq-paper", "qpissa"):
        for record in METHODS[name].solve(problem(fit="mse")).records:
            assert record.error < record.plain_error


def test_an_unknown_method_suggests_the_nearest():
    with pytest.raises(ValueError, match="Did you mean loftq"):
        find_method("loft-q")


def test_error_of_a_zero_weight_is_defined():
    zero = torch.zeros(4, 6)
    assert relative_error(zero, zero, torch.zeros(4, 1), torch.zeros(1, 6), 1.0) == 0.0
