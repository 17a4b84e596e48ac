"""The scale of a group by its error, in plain PyTorch: the definition of the CPU library's search.

With u = x / widest, of the scales s = ratio * widest the first one with the least sum of
(u - ratio * nearest(u / ratio))^2 is taken; of an integer grid the pair of scale and zero. A sum
of float32 depends on its order, and the choice between two nearly equal scales on its last bit:
so the order is a part of the definition, one that vectors of 1 to 16 lanes can follow
(`squared_error`).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from loftq.ops.columns import LEAST_SCALE

SUMS = 16


def squared_error(difference: Tensor) -> Tensor:
    """Sum of squares of each row of (rows, columns) float32, in this order.

    SUMS running sums, column j in sum j % SUMS; then the upper half of them is added to the lower,
    until one is left.
    """
    padded = torch.nn.functional.pad(difference, (0, -difference.shape[-1] % SUMS))
    sums = padded.new_zeros(len(padded), SUMS)
    for block in padded.split(SUMS, -1):
        sums = sums + block * block
    while sums.shape[-1] > 1:
        lower, upper = sums.chunk(2, -1)
        sums = lower + upper
    return sums[:, 0]


def widest_scales(
    x: Tensor, levels: Sequence[float] | Tensor | None, top: int
) -> tuple[Tensor, Tensor | None]:
    """The smallest scale of each row of x that clips nothing, and the zero of integers."""
    low, high = x.amin(-1), x.amax(-1)
    if levels is not None:
        widest = torch.maximum(high / levels[-1], -low / -levels[0])
        return widest.clamp_min(LEAST_SCALE), None
    low, high = low.clamp_max(0), high.clamp_min(0)
    scale = ((high - low) / top).clamp_min(LEAST_SCALE)
    return scale, (-low / scale).round()


def fit_scales_reference(
    x: Tensor, levels: Tensor | None, ratios: Sequence[float], *, top: int, shifts: int = 1
) -> tuple[Tensor, Tensor | None]:
    """(scales, zeros or None) of the groups x (rows, columns), float32.

    Args:
        x: float32, a group in each row.
        levels: (top + 1,) float32 codebook, ascending, or None for an integer grid.
        ratios: multiples of the widest scale to try; none = the widest itself.
        top: largest code.
        shifts: of an integer grid, how many zeros are tried, from that of the widest scale up.
    """
    widest, first = widest_scales(x, levels, top)
    unit = x / widest[:, None]
    scales, zeros, least = widest, first, None
    for ratio in ratios:
        for shift in range(1 if first is None else shifts):
            zero = None if first is None else (first + shift).clamp(max=top)
            error = squared_error(unit - _nearest(unit, ratio, zero, levels, top))
            if least is None:
                scales, zeros, least = widest * ratio, zero, error
                continue
            better = error < least
            least = torch.where(better, error, least)
            scales = torch.where(better, widest * ratio, scales)
            if zeros is not None and zero is not None:
                zeros = torch.where(better, zero, zeros)
    return scales, zeros


def _nearest(
    unit: Tensor, ratio: float, zero: Tensor | None, levels: Tensor | None, top: int
) -> Tensor:
    """Values nearest to `unit`, in units of the widest scale, under a scale of `ratio`."""
    if levels is not None:
        bounds = (levels[1:] + levels[:-1]) / 2 * ratio
        return (levels * ratio)[torch.bucketize(unit, bounds)]
    assert zero is not None
    by, zero = torch.tensor(ratio), zero[:, None]
    codes = (unit * (1 / by) + zero).round().clamp(0, top)
    return (codes - zero) * by
