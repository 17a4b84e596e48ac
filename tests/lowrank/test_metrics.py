"""Metrics and the correction that is best under them: the identities that tie methods together."""

import pytest
import torch

from loftq.lowrank import (
    ChebyshevSolver,
    CholeskyRoot,
    DiagonalRoot,
    EigenRoot,
    ExactSolver,
    IdentityRoot,
    Metric,
    WhitenedSolver,
)
from tolerances import FLOAT32_SOLVE, FLOAT64_SOLVE

OUT, IN, RANK = 24, 40, 5


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def residuals(n=2, out=OUT, columns=IN, seed=0):
    return torch.randn(n, out, columns, generator=generator(seed))


def grams(n=2, columns=IN, seed=1, tokens=400):
    """Correlated inputs with a spread of variances, as a mean over tokens."""
    g = generator(seed)
    mix = torch.randn(n, columns, columns, generator=g) / columns**0.5
    x = torch.randn(n, tokens, columns, generator=g) @ mix
    x = x * torch.logspace(-1, 1, columns)
    return x.mT @ x / tokens


def exact(E, metric, rank=RANK):
    return WhitenedSolver(ExactSolver(rank), metric).solve(E)


def reference(E, H, rank, damping):
    """svd_r(E S) S^-1 with the symmetric root S of the damped Gram, all in float64."""
    H = H.double()
    H = H + damping * H.diagonal().mean() * torch.eye(len(H))
    values, vectors = torch.linalg.eigh(H)
    S, inverse = (vectors * values.sqrt()) @ vectors.T, (vectors / values.sqrt()) @ vectors.T
    U, s, Vt = torch.linalg.svd(E.double() @ S, full_matrices=False)
    return (U[:, :rank] * s[:rank]) @ Vt[:rank] @ inverse


def close(a, b, tolerance):
    return (a.double() - b.double()).norm() <= tolerance * b.double().norm()


@pytest.mark.parametrize("root", [CholeskyRoot, EigenRoot])
def test_every_root_of_the_gram_gives_the_same_correction(root):
    E, H = residuals(), grams()
    found = exact(E, Metric(root(H, damping=1e-3))).product()
    for i in range(len(E)):
        assert close(found[i], reference(E[i], H[i], RANK, 1e-3), FLOAT32_SOLVE)


def test_roots_agree_on_the_norm_and_invert():
    E, H = residuals(), grams()
    chosen = [CholeskyRoot(H, damping=1e-3), EigenRoot(H, damping=1e-3)]
    norms = [Metric(root).norm(E) for root in chosen]
    assert torch.allclose(*norms, rtol=FLOAT64_SOLVE)
    for root in [*chosen, DiagonalRoot(H.diagonal(dim1=1, dim2=2), damping=1e-3)]:
        assert close(root.unapply(root.apply(E)), E, FLOAT64_SOLVE)


def test_norm_is_the_mean_output_error_over_tokens():
    E = residuals(1)
    x = torch.randn(500, IN, generator=generator(3))
    H = (x.T @ x / len(x))[None]
    mean = (x.double() @ E[0].double().T).square().sum(1).mean()
    norm = Metric(CholeskyRoot(H, damping=0.0)).norm(E)[0]
    assert norm.square().item() == pytest.approx(mean.item(), rel=FLOAT32_SOLVE)


@pytest.mark.parametrize("root", [CholeskyRoot, EigenRoot])
def test_an_identity_gram_gives_loftqs_step(root):
    E = residuals()
    found = exact(E, Metric(root(torch.eye(IN).expand(2, -1, -1), damping=0.01))).product()
    plain = ExactSolver(RANK).solve(E).product()
    assert close(found, plain, FLOAT32_SOLVE)


def test_the_identity_metric_is_the_plain_solver():
    E = residuals()
    found, plain = exact(E, Metric()), ExactSolver(RANK).solve(E)
    assert close(found.product(), plain.product(), FLOAT32_SOLVE)
    norms = [(f.B.norm(dim=1), f.A.norm(dim=2)) for f in (found, plain)]
    for B, A in norms:
        assert torch.allclose(B, A, rtol=1e-4)


def test_a_diagonal_gram_makes_the_approximation_exact():
    E = residuals()
    h = torch.rand(2, IN, generator=generator(2)) + 0.1
    approx = exact(E, Metric(DiagonalRoot(h, damping=1e-4))).product()
    full = exact(E, Metric(CholeskyRoot(torch.diag_embed(h), damping=1e-4))).product()
    assert close(approx, full, FLOAT32_SOLVE)


def test_the_closed_form_beats_a_thousand_perturbations():
    E, H = residuals(1), grams(1)
    metric = Metric(CholeskyRoot(H, damping=1e-3))
    found, g = exact(E, metric), generator(4)
    least = metric.norm(E - found.product())
    for size in (1e-3, 1e-2, 1e-1, 1.0):
        B = found.B + size * found.B.std() * torch.randn(250, OUT, RANK, generator=g)
        A = found.A + size * found.A.std() * torch.randn(250, RANK, IN, generator=g)
        norms = torch.linalg.matrix_norm((E - B @ A).double() @ metric.input.factor)
        assert (norms >= least).all()


@pytest.mark.parametrize("shape", [(24, 40), (40, 24), (32, 32)], ids=str)
def test_full_rank_gives_zero(shape):
    E, H = residuals(2, *shape), grams(2, shape[1])
    found = exact(E, Metric(CholeskyRoot(H, damping=1e-4)), rank=min(shape))
    assert close(found.product(), E, FLOAT32_SOLVE)


def test_the_filtered_route_ends_at_the_exact_objective():
    E, H = residuals(3, 96, 128), grams(3, 128, tokens=4000)
    metric = Metric(CholeskyRoot(H, damping=1e-4))
    filtered = WhitenedSolver(ChebyshevSolver(8, generator=generator(5)), metric)
    best = metric.norm(E - exact(E, metric, 8).product())
    for _ in range(2):
        found = metric.norm(E - filtered.solve(E).product())
    assert (found / best - 1).abs().max() < 1e-4


def test_two_sides_weigh_outputs_too():
    """With invertible L and R the best B A is L^-1 svd_r(L E R) R^-1."""
    E, H, F = residuals(1), grams(1), grams(1, OUT, seed=7)
    metric = Metric(CholeskyRoot(H, damping=1e-3), CholeskyRoot(F, damping=1e-3))
    found = exact(E, metric)
    R, L = metric.input.factor[0], metric.output.factor[0]
    U, S, Vt = torch.linalg.svd(L.T @ E[0].double() @ R)
    best = (U[:, :RANK] * S[:RANK]) @ Vt[:RANK]
    wanted = torch.linalg.inv(L.T) @ best @ torch.linalg.inv(R)
    assert close(found.product()[0], wanted, FLOAT32_SOLVE)
    assert metric.norm(E - found.product()) <= metric.norm(E - exact(E, Metric()).product())


def test_the_identity_root_changes_nothing():
    E = residuals()
    assert IdentityRoot().apply(E) is E
    assert Metric().norm(E).dtype == torch.float64
