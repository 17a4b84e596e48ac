"""The scale of a group by error, in one pass over the weights.

Computes, for each row x of (rows, columns), the ratio that minimises ||x - s * nearest(x / s)||^2
with s = ratio * widest, over a few ratios. Reads 4 bytes a weight once and writes 4 bytes a row;
the plain PyTorch search moves some 40 bytes a weight for every ratio. About
ratios * (2 * levels + 4) arithmetic operations a weight, so below 4 bits it is bound by memory.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

MAX_COLUMNS = 256  # a row is held in registers
BLOCK_WEIGHTS = 4096


@triton.jit
def _search(  # type: ignore[no-untyped-def]  # arguments are Triton's
    x_ptr, widest_ptr, best_ptr, levels_ptr, ratios_ptr, rows, columns,
    LEVELS: tl.constexpr, RATIOS: tl.constexpr,
    BLOCK_ROWS: tl.constexpr, BLOCK_COLUMNS: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    column = tl.arange(0, BLOCK_COLUMNS)
    inside = (row < rows)[:, None] & (column < columns)[None, :]
    x = tl.load(x_ptr + row[:, None] * columns + column[None, :], inside, 0.0)  # (ROWS, COLUMNS)
    widest = tl.load(widest_ptr + row, row < rows, 1.0)  # (ROWS,)
    best = widest
    best_error = tl.full((BLOCK_ROWS,), float("inf"), tl.float32)
    for k in range(RATIOS):
        scale = widest * tl.load(ratios_ptr + k)
        u = x / scale[:, None]
        low = tl.load(levels_ptr)
        nearest = tl.zeros_like(u) + low
        for i in tl.static_range(1, LEVELS):
            high = tl.load(levels_ptr + i)
            nearest = tl.where(u > (low + high) * 0.5, high, nearest)
            low = high
        difference = tl.where(inside, x - nearest * scale[:, None], 0.0)
        error = tl.sum(difference * difference, 1)
        best = tl.where(error < best_error, scale, best)
        best_error = tl.minimum(error, best_error)
    tl.store(best_ptr + row, best, row < rows)


def search_scales(x: Tensor, widest: Tensor, levels: Tensor, ratios: Tensor) -> Tensor:
    """Best scale of each row among ratios * widest; all float32 and contiguous, on one device.

    Args:
        x: (rows, columns), columns <= MAX_COLUMNS.
        widest: (rows,), the scale that clips nothing.
        levels: (n,) codebook, ascending.
        ratios: (k,) multiples to try.

    Returns:
        (rows,) float32.
    """
    rows, columns = x.shape
    best = torch.empty_like(widest)
    block_columns = triton.next_power_of_2(columns)
    block_rows = max(1, BLOCK_WEIGHTS // block_columns)
    with torch.cuda.device_of(x):
        _search[(triton.cdiv(rows, block_rows),)](
            x, widest, best, levels, ratios, rows, columns, LEVELS=len(levels),
            RATIOS=len(ratios), BLOCK_ROWS=block_rows, BLOCK_COLUMNS=block_columns,
        )  # fmt: skip
    return best
