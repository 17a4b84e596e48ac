"""Every row of the table in a rotated format, and the identities that a rotation has to keep."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from layer_problem import IN, effective, problem, statistics
from loftq.formats import parse_format
from loftq.methods import METHODS, LayerProblem, ProblemStatistics
from loftq.methods.base import relative_error
from loftq.methods.rival import left_over
from loftq.ops import hadamard
from loftq.transforms import largest_block, rotate_gram, rotated

TURNED = "int2-g64-dq-h128"
INVARIANT = ("loftq", "qpissa", "qera-exact", "cloq", "eora", "projq", "fast", "caldera")
"""Rows whose metric turns with the inputs: that of a diagonal or of a Fisher mean does not."""


def known(name: str, statistics_: ProblemStatistics) -> ProblemStatistics | None:
    return None if METHODS[name].needs == "none" else statistics_


def turned(case: LayerProblem) -> LayerProblem:
    """The same problem with weights and Grams rotated by hand, in the format without its name."""
    found = case.statistics
    if found is not None:
        assert found.gram is not None
        found = replace(found, gram=rotate_gram(found.gram, 128))
    W = hadamard(case.weights, 128, False)
    return replace(case, weights=W, spec=replace(case.spec, rotation=0), statistics=found)


@pytest.mark.parametrize("name", list(METHODS))
def test_every_method_stores_what_its_record_says(name: str) -> None:
    case = problem(1.7, fit="mse", name=TURNED, known=known(name, statistics()))
    solution = METHODS[name].solve(case)
    for i, record in enumerate(solution.records):
        assert record.format == TURNED
        Q, A, B = solution.quantized[i].dequantize(), solution.lora_A[i], solution.lora_B[i]
        error = relative_error(case.weights[i], Q, B, A, 1.7)
        assert record.error == pytest.approx(error, rel=1e-5)


@pytest.mark.parametrize("name", INVARIANT)
def test_a_rotated_format_solves_the_rotated_problem(name: str) -> None:
    """Q R, A R and B are those of W R under R^T H R: A absorbs the rotation."""
    case = problem(fit="mse", name=TURNED, known=known(name, statistics()))
    row = METHODS[name].with_options(solver="exact", iterations=1)
    found, wanted = row.solve(case), row.solve(turned(case))
    for i in range(2):
        ours, theirs = (x.quantized[i].weight_packed for x in (found, wanted))
        assert (ours != theirs).float().mean() < 0.01  # ties that float32 breaks elsewhere
        back = hadamard(effective(found, 1.0, i), 128, False)
        gap = torch.linalg.vector_norm(back - effective(wanted, 1.0, i))
        assert gap < 0.02 * torch.linalg.vector_norm(case.weights[i])
        assert left_over(found.records[i]) == pytest.approx(left_over(wanted.records[i]), rel=5e-3)


def test_outputs_are_worth_the_same_in_either_basis() -> None:
    gram = statistics().gram
    assert gram is not None
    E = torch.randn(2, 5, IN, generator=torch.Generator().manual_seed(0))
    before = (E @ gram * E).sum((1, 2))
    R = hadamard(E, 64, False)
    after = (R @ rotate_gram(gram, 64) * R).sum((1, 2))
    torch.testing.assert_close(before, after, rtol=1e-4, atol=0)
    assert rotate_gram(gram, 0) is gram


def planted() -> LayerProblem:
    """Two normal weights; a column in sixteen of the second is forty times as large."""
    case = problem(name="snf3-g64-dq", known=None)
    case.weights[1, :, ::16] *= 40
    return replace(case, rival=rotated(case.spec, IN))


@pytest.mark.parametrize("name", ["qlora", "loftq"])
def test_auto_rotates_where_outliers_were_planted_and_is_never_worse(name: str) -> None:
    case = planted()
    both = METHODS[name].solve(case)
    assert both.records[1].format == "snf3-g64-dq-h128"
    plain = METHODS[name].solve(replace(case, rival=None))
    every = METHODS[name].solve(replace(case, rival=None, spec=rotated(case.spec, IN)))
    for i in range(2):
        least = min((plain, every), key=lambda solution: left_over(solution.records[i]))
        assert left_over(both.records[i]) == left_over(least.records[i])
        assert both.quantized[i].spec == least.quantized[i].spec
        assert torch.equal(both.quantized[i].weight_packed, least.quantized[i].weight_packed)
        assert torch.equal(both.lora_A[i], least.lora_A[i])
        assert torch.equal(both.lora_B[i], least.lora_B[i])


@pytest.mark.parametrize(
    ("width", "block"), [(576, 64), (1536, 512), (4096, 512), (11008, 256), (48, 16), (75, 0)]
)
def test_blocks_are_the_largest_that_fill_a_row(width: int, block: int) -> None:
    assert largest_block(width) == block
    assert rotated(parse_format("nf2"), width).rotation == block
