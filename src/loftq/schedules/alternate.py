"""Alternate rounding and low-rank correction of W ~ Q + B A.

    quantize-first (LoftQ, arXiv:2310.08659, Alg. 1)     correct-first (QPiSSA, arXiv:2404.02948)
        Q_t = q(W - B_{t-1} A_{t-1})                         B_t A_t = svd_r(W - Q_{t-1})
        B_t A_t = svd_r(W - Q_t)                             Q_t = q(W - B_t A_t)

with B_0 A_0 = 0 and Q_0 = 0. Rounding with a fitted scale is not an exact minimiser, so the error
may rise from one step to the next: `keep="best"` returns the step with the smallest error of each
weight, `keep="last"` the last one, as both papers' code does. With statistics of the inputs the
same loop runs under their metric: q is GPTQ, svd_r the whitened correction, errors are those of the
outputs (CLoQ, arXiv:2501.18475, is its T = 1; the repetition is CALDERA's, arXiv:2405.18886).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from loftq.lowrank import LowRank, Solver
from loftq.rounding import Rounded

ORDERS = ("quantize-first", "correct-first")
KEEP = ("best", "last")

Quantize = Callable[[Tensor], tuple[Rounded, Tensor]]
Norm = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Alternation:
    """The kept iterate of each weight and the way there."""

    rounded: Rounded
    low_rank: LowRank | None
    """None where no step was taken: plain rounding."""
    plain_error: Tensor | None
    """||W - q(W)|| / ||W||, (n,) float64: rounding without correction; None where it is no step."""
    errors: Tensor
    """||W - Q_t - B_t A_t|| / ||W|| for t = 1..T, (T, n) float64."""
    kept: Tensor
    """Step kept for each weight, 1-based; 0 where no step was taken; (n,) int64."""
    preserved: Tensor | None = None
    """Ranks of each weight that hold a part of W itself, (n,) int64; None = no such split."""


def alternate(
    W: Tensor,
    *,
    quantize: Quantize,
    solver: Solver,
    iterations: int,
    order: str = "quantize-first",
    keep: str = "best",
    norm: Norm | None = None,
) -> Alternation:
    """Run `iterations` alternations on a stack of weights.

    Args:
        W: (n, out_features, in_features) float32.
        quantize: W -> (Rounded, its values); sees the weight less the current correction. Both are
            memory of their own: the residual takes the place of the values.
        solver: residual -> LowRank; keeps its own warm state.
        iterations: T >= 0; 0 rounds once and corrects nothing.
        order: which half-step comes first, "quantize-first" or "correct-first".
        keep: "best" or "last" iterate of each weight.
        norm: of each residual of a stack, (n,) float64; None = Frobenius.

    Returns:
        Alternation; all errors are relative, in this norm.

    Raises:
        ValueError: unknown order or keep.
    """
    if order not in ORDERS or keep not in KEEP:
        raise ValueError(f"order={order!r}, keep={keep!r}; choose from {ORDERS} and {KEEP}.")
    norm = norm or frobenius
    whole = norm(W).clamp_min(torch.finfo(torch.float32).tiny)
    rounded, values = quantize(W)
    plain = norm(W - values) / whole
    best: LowRank | None = None
    kept = torch.zeros(len(W), dtype=torch.int64, device=W.device)
    errors: list[Tensor] = []
    product: Tensor | None = None
    for step in range(1, iterations + 1):
        if order == "quantize-first":
            if product is not None:
                # In place, as below: memory that is fresh each time costs more than rounding.
                now, values = quantize(torch.sub(W, product, out=product))
            else:
                now = rounded  # the first quantize-first step rounds W itself
            residual = torch.sub(W, values, out=values)
            correction = solver.solve(residual)
            product = correction.product()
        else:
            correction = solver.solve(W if step == 1 else W - values)
            product = correction.product()
            now, values = quantize(W - product)
            residual = W - values
        error = norm(residual.sub_(product)) / whole
        better = torch.ones_like(error, dtype=torch.bool)
        if keep == "best" and errors:
            better = error < torch.stack(errors).amin(0)
        errors.append(error)
        kept[better] = step
        if best is None or better.all():
            rounded, best = now, correction
        else:
            rounded.update_(better, now)
            best.update_(better, correction)
    stacked = torch.stack(errors) if errors else plain.new_zeros(0, len(W))
    return Alternation(rounded, best, plain, stacked, kept)


def frobenius(E: Tensor) -> Tensor:
    """||E||_F of each matrix of a stack, (n,) float64: float32 squares summed row by row."""
    rows = torch.linalg.vector_norm(E, dim=-1)
    return torch.linalg.vector_norm(rows, dim=-1, dtype=torch.float64)
