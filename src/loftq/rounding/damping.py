"""Damping: what turns a measured Gram into a safely positive definite one, and how much it took.

A Gram of T tokens has rank T at most, and inputs that never occur leave zero rows. Every use of a
Gram therefore adds d mean(diag H) to its diagonal. Where rounding still leaves it indefinite, d is
raised tenfold until the factorization exists, and the d that was used is returned for the record.
"""

from __future__ import annotations

import torch
from torch import Tensor

LEAST_DAMPING = 1e-6  # first value tried where none was asked for and none does not do
BATCHED = 256  # largest matrices of a stack that are factorized together
MOST_DAMPING = 1.0  # beyond it the diagonal outweighs what was measured


class DampingError(ValueError):
    """A Gram that has no Cholesky factor at the damping that was asked for."""


def damped(H: Tensor, damping: Tensor | float) -> Tensor:
    """H + d mean(diag H) I in float64.

    Args:
        H: (n, in_features, in_features), symmetric; an all-zero matrix counts as mean 1.
        damping: d, one number or one for each matrix (n,).
    """
    out = H.to(torch.float64, copy=True)
    mean = out.diagonal(dim1=-2, dim2=-1).mean(-1)
    unit = torch.where(mean > 0, mean, torch.ones_like(mean))
    out.diagonal(dim1=-2, dim2=-1).add_((unit * damping)[:, None])
    return out


def damped_cholesky(H: Tensor, damping: float, *, strict: bool = False) -> tuple[Tensor, Tensor]:
    """Lower Cholesky factors C of the damped matrices, C C^T = H + d mean(diag H) I.

    Args:
        H: (n, in_features, in_features) symmetric, finite.
        damping: d >= 0, relative to the mean of the diagonal.
        strict: raise instead of damping more than was asked for.

    Returns:
        (C (n, in_features, in_features) float64, d used (n,) float64).

    Raises:
        DampingError: strict, or not positive definite even with MOST_DAMPING.
    """
    used = torch.full((len(H),), float(damping), dtype=torch.float64, device=H.device)
    factors, info = cholesky(damped(H, used))
    while (bad := info != 0).any():
        _raise_(used, bad, strict=strict)
        factors[bad], info[bad] = cholesky(damped(H[bad], used[bad]))
    return factors, used


def cholesky(H: Tensor) -> tuple[Tensor, Tensor]:
    """(lower factors, info) of a stack; a GPU's batched routine is made for small matrices only."""
    if len(H) == 1 or H.shape[-1] <= BATCHED:
        return torch.linalg.cholesky_ex(H)
    factors, info = torch.empty_like(H), torch.empty(len(H), dtype=torch.int32, device=H.device)
    for one, factor, failed in zip(H, factors, info, strict=True):
        torch.linalg.cholesky_ex(one, out=(factor, failed))
    return factors, info


def raised_eigenvalues(
    H: Tensor, values: Tensor, damping: float, *, strict: bool = False
) -> tuple[Tensor, Tensor]:
    """Eigenvalues of H + d mean(diag H) I, all above rounding, from those of H.

    Args:
        H: (n, in_features, in_features) symmetric, finite.
        values: its eigenvalues, (n, in_features) float64 ascending.
        damping: d >= 0, relative to the mean of the diagonal; raised as in `damped_cholesky`.
        strict: raise instead of damping more than was asked for.

    Returns:
        (eigenvalues (n, in_features) float64, d used (n,) float64).

    Raises:
        DampingError: strict, or not positive even with MOST_DAMPING.
    """
    mean = H.diagonal(dim1=-2, dim2=-1).double().mean(-1)
    unit = torch.where(mean > 0, mean, torch.ones_like(mean))
    used = torch.full_like(mean, float(damping))
    floor = torch.finfo(torch.float64).eps * values.abs().amax(-1)
    while (bad := values[:, 0] + unit * used <= floor).any():
        _raise_(used, bad, strict=strict)
    return values + (unit * used)[:, None], used


def _raise_(used: Tensor, bad: Tensor, *, strict: bool) -> None:
    """Raise the damping of the matrices that are `bad` tenfold, in place."""
    if strict or (used[bad] >= MOST_DAMPING).any():
        raise DampingError(
            f"{int(bad.sum())} of {len(used)} Gram matrices are not positive definite with "
            f"damping={used[bad].max().item():g}. Calibrate on more tokens or set a larger "
            "damping (strict=false raises it by itself and records that)."
        )
    used[bad] = (10 * used[bad]).clamp(LEAST_DAMPING, MOST_DAMPING)
