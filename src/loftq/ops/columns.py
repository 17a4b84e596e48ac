"""Columns rounded one after the other, in plain PyTorch: the definition of the sweep kernels.

Rounding methods that let one column make up for another walk through the columns in order. What
happens inside of a block of columns is here; between blocks there is one matrix product, which the
methods do themselves (rounding/gptq.py, rounding/descent.py). A column x of a block is coded under
scales s (and zeros z) as they are stored:

    codebook    code = number of bounds below x / s (lower on a tie)     value = s * level
    integer     code = clamp(round_half_even(x / s + z), 0, top)         value = (code - z) * s
"""

from __future__ import annotations

import torch
from torch import Tensor

LEAST_SCALE = 1e-30  # what a scale of 0 divides as


def nearest(
    x: Tensor, scales: Tensor, zeros: Tensor | None, levels: Tensor | None, top: int
) -> tuple[Tensor, Tensor]:
    """(codes uint8, values float32) of x under scales and zeros that broadcast to its shape.

    Args:
        x: float32.
        scales: of its groups, as stored; 0 divides as LEAST_SCALE.
        zeros: of an integer grid, else None.
        levels: (2^bits,) float32 codebook, ascending, or None for an integer grid.
        top: largest code of an integer grid.
    """
    unit = x / torch.where(scales == 0, LEAST_SCALE, scales)
    if levels is not None:
        codes = torch.bucketize(unit, (levels[1:] + levels[:-1]) / 2, out_int32=True)
        return codes.to(torch.uint8), levels[codes] * scales
    assert zeros is not None
    codes = (unit + zeros).round_().clamp_(0, top)
    return codes.to(torch.uint8), (codes - zeros) * scales


def round_columns_reference(
    W: Tensor,
    factor: Tensor,
    scales: Tensor,
    zeros: Tensor | None,
    levels: Tensor | None,
    top: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """GPTQ inside of a block; arguments as in `schema.round_columns`."""
    rest, codes = W.clone(), torch.empty_like(W, dtype=torch.uint8)
    values, errors = torch.empty_like(W), torch.empty_like(W)
    scales = scales.expand(W.shape)
    zeros = None if zeros is None else zeros.expand(W.shape)
    for j in range(W.shape[-1]):
        zero = None if zeros is None else zeros[..., j]
        w = rest[..., j].clone()
        codes[..., j], values[..., j] = nearest(w, scales[..., j], zero, levels, top)
        errors[..., j] = (w - values[..., j]) / factor[:, j, j, None]
        rest[..., j:] -= errors[..., j, None] * factor[:, None, j, j:]
    return codes, values, errors


def descend_columns_reference(
    Q: Tensor,
    G: Tensor,
    gram: Tensor,
    scales: Tensor,
    zeros: Tensor | None,
    levels: Tensor | None,
    top: int,
) -> tuple[Tensor, Tensor]:
    """Coordinate descent inside of a block; arguments as in `schema.descend_columns`."""
    pull, codes = G.clone(), torch.empty_like(Q, dtype=torch.uint8)
    values = torch.empty_like(Q)
    scales = scales.expand(Q.shape)
    zeros = None if zeros is None else zeros.expand(Q.shape)
    for j in range(Q.shape[-1]):
        zero = None if zeros is None else zeros[..., j]
        wanted = Q[..., j] + pull[..., j] / gram[:, j, j, None]
        codes[..., j], values[..., j] = nearest(wanted, scales[..., j], zero, levels, top)
        pull -= (values[..., j] - Q[..., j])[..., None] * gram[:, None, j]
    return codes, values
