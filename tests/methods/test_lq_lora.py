"""lq-lora is its paper's step, in its paper's norm."""

from dataclasses import replace

import pytest
import torch

from layer_problem import effective, problem, statistics
from loftq.methods import METHODS
from loftq.rounding import round_to_nearest
from tolerances import FLOAT32_SOLVE

ROW = METHODS["lq-lora"].with_options(solver="exact", metric_damping=0.0)


def truncated(X, rank):
    U, S, Vt = torch.linalg.svd(X, full_matrices=False)
    return (U[..., :rank] * S[..., None, :rank]) @ Vt[..., :rank, :]


def test_two_steps_are_the_papers_from_its_definition():
    case = problem(known=statistics())
    known, W = case.statistics, case.weights.double()
    rows, columns = known.fisher_rows.sqrt()[:, :, None], known.fisher_columns.sqrt()[:, None, :]
    Q = torch.zeros_like(W)
    for _ in range(2):
        product = truncated(rows * (W - Q) * columns, case.rank) / rows / columns
        Q = round_to_nearest((W - product).float(), case.spec, fit=case.scale_fit)[1].double()
    solution = replace(ROW, iterations=2, keep="last").solve(case)
    for i in range(2):
        found = effective(solution, 1.0, i).double()
        assert (found - Q[i] - product[i]).norm() <= FLOAT32_SOLVE * W[i].norm()


def test_the_kept_iterate_is_the_best_in_the_weighted_norm():
    case = problem(2.0, known=statistics())
    known = case.statistics
    solution = ROW.solve(case)
    for i, record in enumerate(solution.records):
        E = case.weights[i].double() - effective(solution, 2.0, i)
        F = known.fisher_rows[i][:, None] * known.fisher_columns[i]
        whole = (F * case.weights[i].double().square()).sum().sqrt()
        error = ((F * E.square()).sum().sqrt() / whole).item()
        assert error == pytest.approx(min(record.errors), rel=1e-4)
        assert record.errors[record.kept - 1] == min(record.errors)


def test_equal_means_leave_qpissa():
    known = statistics()
    flat = replace(
        known,
        fisher_rows=torch.full_like(known.fisher_rows, 3.0),
        fisher_columns=torch.full_like(known.fisher_columns, 0.5),
    )
    case = problem(known=flat)
    same = METHODS["qpissa"].with_options(solver="exact", iterations=ROW.iterations)
    found, plain = ROW.solve(case), same.solve(problem())
    for i in range(2):
        a, b = effective(found, 1.0, i), effective(plain, 1.0, i)
        assert (a - b).norm() <= FLOAT32_SOLVE * b.norm()


def test_statistics_without_fisher_means_are_refused():
    bare = replace(statistics(), fisher_rows=None, fisher_columns=None)
    with pytest.raises(ValueError, match="layer0: this method needs Fisher means"):
        ROW.solve(problem(known=bare))
