"""The natural-gradient step against its equation, and its two limits."""

import pytest
import torch

from loftq.lowrank import ExactSolver, LowRank, Metric, WhitenedSolver, evenly_split
from loftq.lowrank.metrics import EigenRoot
from loftq.refine import NaturalStep
from loftq.refine.natural import DAMPING
from tolerances import FLOAT32_SOLVE

OUT, IN, RANK = 24, 40, 5


def gram(n: int, seed: int) -> torch.Tensor:
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(3 * n, n, generator=g).double() @ torch.randn(n, n, generator=g).double()
    return x.mT @ x / len(x)


def start() -> LowRank:
    g = torch.Generator().manual_seed(3)
    B = torch.randn(1, OUT, RANK, generator=g).double()
    A = torch.randn(1, RANK, IN, generator=g).double()
    return evenly_split(B, A)


def root(H: torch.Tensor) -> torch.Tensor:
    values, V = torch.linalg.eigh(H + DAMPING * torch.linalg.eigvalsh(H)[-1] * torch.eye(len(H)))
    return (V * values.sqrt()) @ V.mT


def size(X: torch.Tensor) -> float:
    return torch.linalg.matrix_norm(X).item()


@pytest.mark.parametrize("trust", [0.05, 0.3, 1e6])
def test_it_is_the_papers_equation(trust: float) -> None:
    H, Hz, L = gram(IN, 0), gram(OUT, 1), start()
    G = torch.randn(OUT, IN, generator=torch.Generator().manual_seed(2)).double()
    R, S = root(H), root(Hz)
    Y, M = S @ L.product()[0].double() @ R, torch.linalg.solve(S, G) @ torch.linalg.inv(R)
    a = min(1.0, trust * size(Y) / size(M))
    U, s, Vt = torch.linalg.svd(Y - a * M)
    cut = (U[:, :RANK] * s[:RANK]) @ Vt[:RANK]
    expected = torch.linalg.solve(S, cut) @ torch.linalg.inv(R)
    found = NaturalStep(G, H, Hz).after(L, trust=trust)
    assert size(found.product()[0] - expected) < FLOAT32_SOLVE * size(expected)
    assert found.A.shape == L.A.shape
    assert size(found.A[0] @ found.A[0].mT - found.B[0].mT @ found.B[0]) < 1e-3 * size(found.A[0])


def test_a_whole_step_on_a_quadratic_loss_ends_at_the_best_correction_under_both_metrics() -> None:
    """The curvature is exact there: one step is the closed form, wherever it begins."""
    H, Hz, L = gram(IN, 0), gram(OUT, 1), start()
    E = torch.randn(OUT, IN, generator=torch.Generator().manual_seed(4)).double()
    inputs, outputs = root(H) @ root(H), root(Hz) @ root(Hz)  # damped, as the step sees them
    G = -outputs @ (E - L.product()[0].double()) @ inputs
    far = LowRank(1e3 * L.B, L.A)  # so that the trust does not bind
    G_far = -outputs @ (E - far.product()[0].double()) @ inputs
    metric = Metric(EigenRoot(inputs[None], damping=0.0), EigenRoot(outputs[None], damping=0.0))
    best = WhitenedSolver(ExactSolver(RANK), metric).solve(E[None].float()).product()[0]
    for begin, gradient in ((L, G), (far, G_far)):
        found = NaturalStep(gradient, H, Hz).after(begin, trust=1e6).product()[0]
        assert size(found - best) < 20 * FLOAT32_SOLVE * size(best)


def test_no_trust_and_no_gradient_leave_the_correction_as_it_is() -> None:
    H, Hz, L = gram(IN, 0), gram(OUT, 1), start()
    G = torch.ones(OUT, IN).double()
    for found in (
        NaturalStep(G, H, Hz).after(L, trust=0.0),
        NaturalStep(0 * G, H, Hz).after(L, trust=0.5),
        NaturalStep(0 * G, 0 * H, 0 * Hz).after(L, trust=0.5),
    ):
        assert size(found.product()[0] - L.product()[0]) < FLOAT32_SOLVE * size(L.product()[0])


def test_a_zero_correction_stays_zero() -> None:
    L = LowRank(torch.zeros(1, OUT, RANK), start().A)
    found = NaturalStep(torch.ones(OUT, IN), gram(IN, 0), gram(OUT, 1)).after(L, trust=0.5)
    assert size(found.product()[0]) < 1e-6
    assert torch.isfinite(found.A).all()
