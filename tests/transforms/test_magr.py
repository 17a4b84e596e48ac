"""MagR against its definition."""

from itertools import pairwise

import pytest
import torch
from torch import Tensor

from layer_problem import problem, statistics
from loftq.rounding import output_error, round_to_nearest
from loftq.transforms import largest_prox, magr
from loftq.transforms.magr import largest_eigenvalue


def objective(V: Tensor, W: Tensor, H: Tensor, a: float, size: int) -> Tensor:
    """The paper's, with H in units of its largest eigenvalue."""
    unit = torch.linalg.eigvalsh(H.double())[..., -1]
    ranges = V.unflatten(-1, (-1, size)).abs().amax(-1).double().sum((1, 2))
    return output_error(V - W, H) / (2 * unit) + a * ranges


def test_the_worked_case() -> None:
    assert largest_prox(torch.tensor([3.0, 1.0]), 1.0, 2).tolist() == [2.0, 1.0]
    assert largest_prox(torch.tensor([0.3, -0.6]), 1.0, 2).tolist() == [0.0, 0.0]
    assert largest_prox(torch.tensor([3.0, -3.0, 1.0]), 1.0, 3).tolist() == [2.5, -2.5, 1.0]


@pytest.mark.parametrize("a", [0.01, 0.5, 20.0])
def test_the_prox_is_the_minimum(a: float) -> None:
    g = torch.Generator().manual_seed(0)
    v = torch.randn(3, 5, 37, generator=g)

    def value(u: Tensor) -> Tensor:
        padded = torch.nn.functional.pad(u, (0, 11)).unflatten(-1, (3, 16))
        return (u - v).square().sum() / 2 + a * padded.abs().amax(-1).sum()

    best = largest_prox(v, a, 16)
    for size in (1e-3, 1e-2, 0.3):
        for _ in range(50):
            assert value(best) <= value(best + size * torch.randn(v.shape, generator=g)) + 1e-4


def test_the_objective_falls_and_ranges_with_it() -> None:
    case = problem(known=statistics())
    W, H = case.weights, case.statistics.gram
    a = 1e-2
    values = [
        objective(magr(W, H, group_size=64, strength=a, iterations=k), W, H, a, 64)
        for k in (0, 1, 5, 50, 400)
    ]
    for before, after in pairwise(values):
        assert (after < before).all()
    V = magr(W, H, group_size=64, strength=a, iterations=400)
    g = torch.Generator().manual_seed(1)
    for _ in range(100):
        other = V + 0.02 * torch.randn(V.shape, generator=g)
        assert (objective(other, W, H, a, 64) > values[-1] * (1 - 1e-4)).all()
    ranges = [x.unflatten(-1, (-1, 64)).abs().amax(-1).mean() for x in (V, W)]
    assert ranges[0] < 0.9 * ranges[1]
    whole = output_error(W, H)
    assert (output_error(V - W, H) < 0.01 * whole).all()


def test_plain_rounding_gains_from_it() -> None:
    """What the paper is about: the range of a group decides the step of its grid."""
    case = problem(known=statistics(), name="int2-g64-f32")
    W, H = case.weights, case.statistics.gram
    V = magr(W, H, group_size=64, strength=1e-2, iterations=400)
    plain, smooth = (
        output_error(W - round_to_nearest(X, case.spec, fit="absmax")[1], H) for X in (W, V)
    )
    assert (smooth < plain).all()


def test_one_scale_per_row_and_the_papers_strengths() -> None:
    case = problem(known=statistics())
    W, H = case.weights, case.statistics.gram
    rows = magr(W, H, group_size=0, iterations=5)
    assert torch.equal(rows, magr(W, H, group_size=128, strength=1e-3, iterations=5))
    groups = magr(W, H, group_size=64, iterations=5)
    assert torch.equal(groups, magr(W, H, group_size=64, strength=1e-4, iterations=5))


def test_the_largest_eigenvalue_comes_from_below() -> None:
    H = statistics().gram.double()
    exact = torch.linalg.eigvalsh(H)[:, -1]
    found = largest_eigenvalue(H)
    assert (found <= exact * (1 + 1e-9)).all()
    assert (found > 0.9 * exact).all()
    assert largest_eigenvalue(torch.zeros(1, 4, 4, dtype=torch.float64)).item() == 1
