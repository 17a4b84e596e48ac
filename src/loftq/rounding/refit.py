"""The best scales for given codes: a least-squares fit per row under the Gram of the inputs.

Let row w be coded by q = sum_g s_g u_g, where u_g holds the unit values (level, or code - zero) of
group g and zeros elsewhere. Its output error (w - q) H (w - q)^T is quadratic in the scales, and

    M s = b,    M_gh = u_g H u_h^T,    b_g = u_g H w^T

gives its minimum. Searching a scale group by group, as `fit` does, sees neither the other groups
nor the correlations of the inputs.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import pad

from loftq.formats import grid_of, round_trip_scales
from loftq.rounding.rtn import Rounded

RIDGE = 1e-3  # pull towards the old scales, relative to the mean of diag M: few tokens overfit
FAR = 3.0  # a scale that moves by more than this factor belongs to codes that say nothing of it
ROWS = 1 << 9  # rows whose M is solved at once


def refit_scales(W: Tensor, gram: Tensor, rounded: Rounded, *, ridge: float = RIDGE) -> Tensor:
    """Scales (n, out, groups) float32 that minimise tr((W - Q) H (W - Q)^T) at these codes.

    Args:
        W: (n, out_features, in_features) float32.
        gram: H, damped, (n, in_features, in_features) float64.
        rounded: codes and zeros; its stored scales are where the ridge pulls to.
        ridge: relative to the mean of diag M of a row.

    Returns:
        The new scales. One that would leave [old / FAR, FAR * old] stays as it was.
    """
    spec, size = rounded.spec, max(rounded.spec.group_size, 0) or W.shape[-1]
    old = round_trip_scales(rounded.scales, spec.scale_coding)
    units = grid_of(spec).decode(rounded.codes, torch.ones_like(old), rounded.zeros)
    new = torch.empty_like(old)
    for i, H in enumerate(gram):
        for start in range(0, W.shape[1], ROWS):
            at = (i, slice(start, start + ROWS))
            new[at] = _solve(W[at].double(), H, units[at].double(), old[at].double(), size, ridge)
    far = (new < old / FAR) | (new > old * FAR)
    return torch.where(far, old, new)


def _solve(w: Tensor, H: Tensor, units: Tensor, old: Tensor, size: int, ridge: float) -> Tensor:
    """M s = b of some rows (rows, in_features), towards `old` (rows, groups)."""

    def by_group(x: Tensor) -> Tensor:
        return pad(x, (0, -x.shape[-1] % size)).unflatten(-1, (-1, size)).sum(-1)

    columns = range(0, w.shape[-1], size)
    M = torch.stack(
        [by_group((units[:, c : c + size] @ H[c : c + size]) * units) for c in columns], -2
    )
    b = by_group((w @ H) * units)
    pull = ridge * M.diagonal(dim1=-2, dim2=-1).mean(-1, keepdim=True).clamp_min(1e-30)
    M.diagonal(dim1=-2, dim2=-1).add_(pull)
    return torch.linalg.solve(M, b + pull * old)
