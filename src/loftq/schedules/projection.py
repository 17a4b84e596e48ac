"""Variable projection: round W knowing that a correction will follow.

Alternation rounds what the last correction left, as if that were final. But whatever Q is, B will
be refitted to it. For fixed A the best B is B = (W - Q) H A^T (A H A^T)^-1, and with A normalized
to A H A^T = I what remains of the output error is

    tr((W - Q) H_A (W - Q)^T),    H_A = H - H A^T A H,

so Q is rounded under H_A: errors in the span of A cost nothing (ProjQ, arXiv:2606.00494, in terms
of the Gram). Nor does it matter which part of W in the span of A is rounded at all: H_A A^T = 0,
and B makes up for it. The part W P, P the orthogonal projection on the rows of A, is taken off
before rounding, so that the groups have smaller ranges:

    Q_t     = q(W - W P_t) under H_{A_t} + d mean(diag H) I
    B A_t+1 = best rank-r correction of W - Q_t under H

The start A_1 spans the leading eigenvectors of H. The step with the smallest error of each weight
is kept.

ProjQ's own steps differ in three ways: A_1 belongs to the residual of a first rounding under H, all
of W is rounded (span="round"), and the rank r_d that rounding looks ahead to (`design`) need not be
that of the correction.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from loftq.lowrank import LowRank, Solver, orthonormal
from loftq.rounding import Rounded
from loftq.schedules.alternate import Alternation, Norm, Quantize


def project(
    W: Tensor,
    *,
    aim: Tensor | None = None,
    root: Tensor,
    quantize_under: Callable[[Tensor], Quantize],
    solver: Solver,
    iterations: int,
    damping: float,
    norm: Norm,
    leading: Solver | None = None,
    design: Solver | None = None,
    span: str = "subtract",
) -> Alternation:
    """Run `iterations` steps of variable projection on a stack of weights.

    Args:
        W: what is rounded, (n, out_features, in_features) float32.
        aim: what Q + B A is to be, of the same shape, where that is not W.
        root: C with C C^T = H, (n, in_features, in_features) float64.
        quantize_under: Gram (n, in_features, in_features) -> rounding under it.
        solver: best correction of a residual under H.
        iterations: T >= 1.
        damping: d, relative to the mean of diag H: H_A itself has lost the rank of A.
        norm: of each residual under H, (n,) float64.
        leading: plain solver that finds the leading eigenvectors of H from C^T, where A_1 is to
            span them; None = A_1 from the residual of rounding W under H.
        design: best correction of a residual under H at another rank, whose A rounding looks ahead
            to; None = `solver`.
        span: "subtract" takes W P off before rounding, "round" does not.

    Returns:
        Alternation without `plain_error`: rounding alone is no step of this.
    """
    H = root @ root.mT
    aim = W if aim is None else aim
    whole = norm(aim).clamp_min(torch.finfo(torch.float32).tiny)
    added = damping * H.diagonal(dim1=-2, dim2=-1).mean(-1)
    kept = torch.ones(len(W), dtype=torch.int64, device=W.device)
    errors: list[Tensor] = []
    best: tuple[Rounded, LowRank] | None = None
    if leading is not None:
        A = leading.solve(root.mT).A
    else:
        A = (design or solver).solve(aim - quantize_under(_raised_(H.clone(), added))(W)[1]).A
    for step in range(1, iterations + 1):
        A = normalized(A.double(), H)
        quantize = quantize_under(_raised_(without(A, H), added))
        rounded, values = quantize(less_span(W, A) if span == "subtract" else W)
        residual = aim - values
        correction = solver.solve(residual)
        A = (correction if design is None else design.solve(residual)).A
        error = norm(residual.sub_(correction.product())) / whole
        better = error < torch.stack([torch.full_like(error, torch.inf), *errors]).amin(0)
        errors.append(error)
        kept[better] = step
        if best is None:
            best = rounded, correction
        else:
            best[0].update_(better, rounded)
            best[1].update_(better, correction)
    assert best is not None, "projection takes at least one step"
    return Alternation(best[0], best[1], None, torch.stack(errors), kept)


def normalized(A: Tensor, H: Tensor) -> Tensor:
    """The rows of A (n, rank, in_features) float64 recombined so that A H A^T = I."""
    rows = orthonormal(A.mT)[0].mT  # first to unit length: R^-1 has left them of any size
    lower = torch.linalg.cholesky(rows @ H @ rows.mT)
    return torch.linalg.solve_triangular(lower, rows, upper=False)


def without(A: Tensor, H: Tensor) -> Tensor:
    """H_A = H - H A^T A H for normalized A, symmetric."""
    HA = H @ A.mT
    return torch.baddbmm(H, HA, HA.mT, alpha=-1)


def less_span(W: Tensor, A: Tensor) -> Tensor:
    """W - W P, P the orthogonal projection on the rows of A; float32."""
    basis, _ = orthonormal(A.mT)
    return (W - (W.double() @ basis) @ basis.mT).float()


def _raised_(H: Tensor, added: Tensor) -> Tensor:
    """H + added I in place, one number for each matrix."""
    H.diagonal(dim1=-2, dim2=-1).add_(added[:, None])
    return H
