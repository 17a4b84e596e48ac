"""Cost = what a layer's method leaves, squared: of the weight, or of the outputs where known.

    cost[i, f] = ||W - Q - s B A||_F^2             without statistics of the inputs
               = tr(E H E^T), E = W - Q - s B A    with the Gram H = E[x x^T] (or its diagonal)
               = sum_ij F_ij E_ij^2                with Fisher means, F_ij = rows_i columns_j / mean

over the whole decomposition in that format. With Fisher means this is the integer program of
LQ-LoRA (arXiv:2311.12023, section 3.2), F of rank one; without statistics, its data-free variant.
`ERROR` adds these as they are, so that a layer counts by the size of its outputs; `RELATIVE`
divides by the same of W itself, so that every layer counts by its share of noise.
"""

from __future__ import annotations

import torch
from torch import Tensor

from loftq.allocation.base import Allocation
from loftq.methods import ProblemStatistics
from loftq.rounding import output_error


def squared_error(E: Tensor, known: ProblemStatistics | None) -> float:
    """||E||_F^2, tr(E H E^T) where H is known, or weighted by Fisher means; in float64.

    Args:
        E: (out_features, in_features) float32.
        known: statistics of this one weight, or None.
    """
    if known is None:
        return E.double().square().sum().item()
    if known.fisher_rows is not None and known.fisher_columns is not None:
        rows, columns = known.fisher_rows[0], known.fisher_columns[0]
        mean = rows.mean().clamp_min(torch.finfo(torch.float64).tiny)
        return (rows @ E.double().square() @ columns / mean).item()
    if known.gram is None:
        return (E.double().square() * known.mean_square[0].double()).sum().item()
    return output_error(E[None], known.gram[0]).item()


def error(E: Tensor, W: Tensor, known: ProblemStatistics | None) -> float:
    """The squared error of a layer."""
    return squared_error(E, known)


def relative_error(E: Tensor, W: Tensor, known: ProblemStatistics | None) -> float:
    """The squared error of a layer over that of leaving the layer out."""
    whole = squared_error(W, known)
    return squared_error(E, known) / max(whole, torch.finfo(torch.float64).tiny)


ERROR = Allocation(
    name="error",
    paper="2311.12023",
    summary="least sum of squared errors: of the outputs for a calibrated method, else of weights.",
    of_residual=error,
)
RELATIVE = Allocation(
    name="relative",
    paper="",
    summary="the same, each layer's error relative to its outputs (or weights).",
    of_residual=relative_error,
)
