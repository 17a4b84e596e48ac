import torch

from layer_problem import IN, problem, statistics
from loftq.lowrank import CholeskyRoot, ExactSolver, Metric, WhitenedSolver
from loftq.rounding import Gptq
from loftq.schedules import project
from loftq.schedules.projection import less_span, normalized, without

RANK = 8


def parts():
    case = problem(known=statistics(), name="int2-g64-dq", fit="mse")
    metric = Metric(CholeskyRoot(case.statistics.gram, damping=1e-3))
    root = metric.input.factor
    return case.weights, root @ root.mT, metric, case.spec


def rows(seed=3):
    g = torch.Generator().manual_seed(seed)
    return torch.randn(2, RANK, IN, generator=g, dtype=torch.float64) * torch.logspace(-3, 3, IN)


def test_rows_are_normalized_and_span_what_they_did():
    _, H, _, _ = parts()
    A = normalized(rows(), H)
    assert torch.allclose(A @ H @ A.mT, torch.eye(RANK).double(), atol=1e-8)
    assert torch.linalg.matrix_rank(torch.cat([A, rows()], 1)).tolist() == [RANK, RANK]


def test_what_remains_under_a_fixed_row_space_is_the_error_after_the_best_b():
    W, H, _, _ = parts()
    A, E = normalized(rows(), H), W.double()
    B = E @ H @ A.mT
    left = E - B @ A
    best = ((left @ H) * left).sum((1, 2))
    assert torch.allclose(((E @ without(A, H)) * E).sum((1, 2)), best, rtol=1e-8)


def test_the_part_in_the_span_is_free():
    W, H, _, _ = parts()
    A = normalized(rows(), H)
    remaining = without(A, H)
    assert ((remaining @ A.mT).norm() / H.norm()) < 1e-10
    taken = (W - less_span(W, A)).double()
    assert (taken @ remaining).norm() < 1e-6 * (taken @ H).norm()
    assert less_span(W, A).norm() < W.norm()


def run(iterations, damping=0.01):
    W, _, metric, spec = parts()
    solver = WhitenedSolver(ExactSolver(RANK), metric)
    return (
        W,
        metric,
        project(
            W,
            root=metric.input.factor,
            quantize_under=lambda gram: Gptq(gram, spec, fit="mse", damping=0.0),
            leading=ExactSolver(RANK),
            solver=solver,
            iterations=iterations,
            damping=damping,
            norm=metric.norm,
        ),
    )


def test_the_recorded_error_is_that_of_the_kept_step():
    W, metric, found = run(4)
    left = W - found.rounded.decode() - found.low_rank.product()
    error = metric.norm(left) / metric.norm(W)
    assert torch.allclose(error, found.errors[found.kept - 1, torch.arange(2)], rtol=1e-6)
    assert torch.equal(found.errors.amin(0), found.errors[found.kept - 1, torch.arange(2)])


def test_it_is_ahead_of_rounding_first_and_correcting_then():
    W, metric, found = run(3)
    _, _, _, spec = parts()
    gram = statistics().gram
    _, values = Gptq(gram, spec, fit="mse", damping=0.01)(W)
    fixed = WhitenedSolver(ExactSolver(RANK), metric).solve(W - values)
    after = metric.norm(W - values - fixed.product()) / metric.norm(W)
    assert (found.errors.amin(0) < 0.97 * after).all()
