"""The best scales for given codes: a least-squares fit per row under the Gram of the inputs.

Let row w be coded by q = sum_g s_g u_g, where u_g holds the unit values (level, or code - zero) of
group g and zeros elsewhere. Its output error (w - q) H (w - q)^T is quadratic in the scales, and

    M s = b,    M_gh = u_g H u_h^T,    b_g = u_g H w^T

gives its minimum. What is solved is the step from the scales there are, M (s - s_old) = c with
c_g = u_g H (w - q_old)^T, whose rounding is relative to the step and not to the scales. Where all
rows share one scale, their M and c are added. Searching a scale group by group, as `fit` does, sees
neither the other groups nor the correlations of the inputs.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import pad

from loftq.formats import grid_of, round_trip_scales
from loftq.ops.reference import PER_TENSOR
from loftq.rounding.rtn import Rounded

RIDGE = 1e-3  # pull towards the old scales, relative to the mean of diag M: few tokens overfit
FAR = 3.0  # a scale that moves by more than this factor belongs to codes that say nothing of it
WEIGHTS_AT_ONCE = 1 << 24  # whose M are made at once ...
ELEMENTS_AT_ONCE = 1 << 26  # ... and elements of these


def refit_scales(
    W: Tensor,
    gram: Tensor,
    rounded: Rounded,
    *,
    ridge: float = RIDGE,
    pulled: Tensor | None = None,
) -> Tensor:
    """Scales (n, out, groups) float32 that minimise tr((W - Q) H (W - Q)^T) at these codes.

    Args:
        W: (n, out_features, in_features) float32.
        gram: H, damped, (n, in_features, in_features) float32 or float64; M and c are summed in its
            dtype and solved in float64. The ridge is far above what float32 rounds.
        rounded: codes and zeros; its stored scales are where the ridge pulls to.
        ridge: relative to the mean of diag M of a row.
        pulled: (W - Q) H of the rounded weights in the same dtype, where it is known already.

    Returns:
        The new scales, one for each old one. One that would leave [old / FAR, FAR * old], or whose
        M is singular, stays as it was.
    """
    spec, size = rounded.spec, max(rounded.spec.group_size, 0) or W.shape[-1]
    old = round_trip_scales(rounded.scales, spec.scale_coding)
    units = grid_of(spec).decode(rounded.codes, torch.ones_like(old), rounded.zeros)
    new = torch.empty_like(old)
    if pulled is None:
        pulled = (W - rounded.decode()).to(gram.dtype) @ gram
    if W.is_cuda and _fits_at_once(units, size) and spec.group_size != PER_TENSOR:
        moved = _step(*equations_at_once(pulled, gram, units, size), ridge)
        return _unless_far((old + moved).to(old.dtype), old)
    for i, H in enumerate(gram):
        if spec.group_size == PER_TENSOR:
            M, c = (x.sum(0, keepdim=True) for x in _equations(pulled[i], H, units[i], size))
            new[i] = old[i] + _step(M, c, ridge)
            continue
        for rows in range(0, W.shape[1], step := _rows_at_once(W.shape[-1], size)):
            at = slice(rows, rows + step)
            M, c = _equations(pulled[i, at], H, units[i, at], size)
            new[i, at] = old[i, at] + _step(M, c, ridge)
    return _unless_far(new, old)


def _unless_far(new: Tensor, old: Tensor) -> Tensor:
    return torch.where((new >= old / FAR) & (new <= old * FAR), new, old)


def _fits_at_once(units: Tensor, size: int) -> bool:
    return units.numel() * -(-units.shape[-1] // size) <= ELEMENTS_AT_ONCE


def _rows_at_once(columns: int, size: int) -> int:
    groups = -(-columns // size)
    return max(1, min(WEIGHTS_AT_ONCE // columns, ELEMENTS_AT_ONCE // groups**2))


def _equations(pulled: Tensor, H: Tensor, units: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """M (rows, groups, groups), of which only the lower half is filled, and c (rows, groups)."""
    units = units.to(H.dtype)
    if short := -units.shape[-1] % size:
        pulled, units = pad(pulled, (0, short)), pad(units, (0, short))
        H = pad(H, (0, short, 0, short))
    groups = units.shape[-1] // size

    def by_group(x: Tensor) -> Tensor:
        return x.unflatten(-1, (-1, size)).sum(-1)

    M = units.new_zeros(len(units), groups, groups)
    for g in range(groups):
        at, on = slice(g * size, (g + 1) * size), slice(g * size, None)
        M[:, g:, g] = by_group((units[:, at] @ H[at, on]).mul_(units[:, on]))
    return M, by_group(pulled * units)


def equations_at_once(pulled: Tensor, H: Tensor, units: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """M and c of a whole stack, all groups together: a dozen launches in place of hundreds.

    Args:
        pulled: (W - Q) H, (n, rows, columns).
        H: (n, columns, columns).
        units: unit values, (n, rows, columns).
        size: columns of a group.

    Returns:
        (M (n, rows, groups, groups), c (n, rows, groups)).
    """
    units = units.to(H.dtype)
    if short := -units.shape[-1] % size:
        pulled, units = pad(pulled, (0, short)), pad(units, (0, short))
        H = pad(H, (0, short, 0, short))
    groups = (units.shape[-1] // size, size)
    by_group = units.unflatten(-1, groups)  # (n, rows, groups, size)
    products = by_group.transpose(1, 2) @ H.unflatten(-2, groups)  # (n, groups, rows, columns)
    M = products.mul_(units[:, None]).unflatten(-1, groups).sum(-1).transpose(1, 2)
    return M, (pulled * units).unflatten(-1, groups).sum(-1)


def _step(M: Tensor, c: Tensor, ridge: float) -> Tensor:
    """s - s_old (..., groups), pulled towards 0; NaN where M has no Cholesky factor."""
    M = M.double()
    pull = ridge * M.diagonal(dim1=-2, dim2=-1).mean(-1, keepdim=True).clamp_min(1e-30)
    M.diagonal(dim1=-2, dim2=-1).add_(pull)
    lower, info = torch.linalg.cholesky_ex(M)
    step = torch.cholesky_solve(c.double()[..., None], lower)[..., 0]
    return torch.where((info == 0)[..., None], step, torch.nan)
