import pytest
import torch

from loftq.formats import parse_format
from loftq.lowrank import ChebyshevSolver, ExactSolver, best_correction, make_solver
from loftq.lowrank.chebyshev import orthonormalize
from loftq.rounding import round_to_nearest
from loftq.schedules import alternate
from tolerances import CHEBYSHEV_EXCESS


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("shape", [(40, 70), (70, 40), (33, 33)], ids=str)
def test_exact_solver_is_the_truncated_svd(shape):
    E = torch.randn(*shape, generator=generator())
    U, S, Vt = torch.linalg.svd(E.double(), full_matrices=False)
    truncated = (U[:, :5] * S[:5]) @ Vt[:5]
    found = best_correction(E, 5)
    assert torch.allclose(found.product().double(), truncated, atol=1e-5)
    assert torch.allclose(found.B.norm(dim=0), found.A.norm(dim=1), rtol=1e-4)


def test_full_rank_gives_zero_error():
    E = torch.randn(24, 16, generator=generator())
    assert (E - best_correction(E, 16).product()).norm() < 1e-4


def test_best_correction_beats_random_perturbations():
    E = torch.randn(20, 30, generator=generator())
    found = best_correction(E, 4)
    least = (E - found.product()).norm()
    g = generator(1)
    for _ in range(200):
        B = found.B + 0.01 * torch.randn(found.B.shape, generator=g)
        A = found.A + 0.01 * torch.randn(found.A.shape, generator=g)
        assert (E - B @ A).norm() >= least


@pytest.mark.parametrize("rank", [0, 17])
def test_rank_out_of_range_is_refused(rank):
    with pytest.raises(ValueError, match=r"outside 1\.\.16"):
        best_correction(torch.randn(24, 16), rank)


def test_orthonormal_columns_even_when_nearly_dependent():
    Y = torch.randn(2, 60, 8, generator=generator())
    Y[:, :, 3] = Y[:, :, 2] * (1 + 1e-6)
    Q = orthonormalize(Y)
    assert torch.isfinite(Q).all()
    full = orthonormalize(torch.randn(2, 60, 8, generator=generator(1)))
    assert torch.allclose(full.mT @ full, torch.eye(8).expand(2, 8, 8), atol=1e-5)


@pytest.mark.parametrize("name", ["nf4", "nf3", "nf2"])
@pytest.mark.parametrize("fit", ["absmax", "mse"])
@pytest.mark.parametrize("shape", [(512, 384), (384, 512)], ids=str)
def test_chebyshev_loop_ends_within_a_twentieth_of_a_percent_of_exact(name, fit, shape):
    scale = torch.exp(0.3 * torch.randn(shape[1], generator=generator(3)))
    W = torch.randn(4, *shape, generator=generator(2)) * scale
    spec = parse_format(f"{name}-g64-f32")

    def last_error(solver):
        found = alternate(
            W,
            quantize=lambda target: round_to_nearest(target, spec, fit=fit),
            solver=solver,
            iterations=5,
            keep="last",
        )
        return found.errors[-1]

    exact = last_error(ExactSolver(16))
    filtered = last_error(ChebyshevSolver(16, generator=generator(4)))
    # The path forks chaotically, so single weights scatter by a few 1e-4 to either side.
    assert (filtered / exact - 1).mean() <= CHEBYSHEV_EXCESS


def test_steep_spectra_are_followed():
    """2-bit absmax residuals of weights with strong leading directions: top / b of hundreds."""
    g = generator(5)
    U, V = torch.randn(512, 64, generator=g), torch.randn(64, 512, generator=g)
    E = (U * torch.arange(1, 65) ** -1.5) @ V + 0.01 * torch.randn(512, 512, generator=g)
    exact = (E - best_correction(E, 16).product()).norm()
    filtered = ChebyshevSolver(16, generator=generator(6)).solve(E[None])
    assert (E - filtered.product()[0]).norm() / exact - 1 < 1e-4


def test_wide_and_tall_are_transposes_of_each_other():
    E = torch.randn(1, 90, 60, generator=generator())
    tall = ChebyshevSolver(8, generator=generator(1)).solve(E)
    wide = ChebyshevSolver(8, generator=generator(1)).solve(E.mT.contiguous())
    assert torch.allclose(tall.product(), wide.product().mT, atol=1e-4)


def test_matrices_smaller_than_the_block_are_solved():
    E = torch.randn(3, 20, 12, generator=generator())
    found = ChebyshevSolver(4, generator=generator(1)).solve(E)
    exact = ExactSolver(4).solve(E)
    assert torch.allclose(found.product(), exact.product(), atol=1e-3)


def test_rank_deficient_and_zero_residuals_leave_their_neighbours_alone():
    E = torch.randn(4, 48, 48, generator=generator())
    E[1] = 0
    E[2] = torch.outer(E[2, 0], E[2, 1])
    found = ChebyshevSolver(4, generator=generator(1)).solve(E)
    exact = ExactSolver(4).solve(E)
    assert torch.allclose(found.product(), exact.product(), atol=1e-4)


def test_a_block_as_wide_as_the_matrix_is_solved_for_every_weight_of_a_stack():
    E = torch.randn(64, 48, 48, generator=generator(7)) * 1e-3
    solver = ChebyshevSolver(4, generator=generator(1))
    for _ in range(3):
        found = solver.solve(E)
    left = (E - found.product()).flatten(1).norm(dim=1)
    best = (E - ExactSolver(4).solve(E).product()).flatten(1).norm(dim=1)
    assert (left / best - 1).max() < 1e-4


def test_unknown_solver_is_named():
    with pytest.raises(ValueError, match="unknown solver 'svds'"):
        make_solver("svds", 4, generator())
