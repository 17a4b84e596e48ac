"""The scale of a group by error, in one pass over the weights.

Computes, for each row x of (rows, columns), the ratio that minimises ||x - s * nearest(x / s)||^2
with s = ratio * widest, over a few ratios; for integers with a zero z, the ratio and the z that
minimise ||x - s * (clamp(round(x / s + z)) - z)||^2. Reads 4 bytes a weight once and writes 4 or 8
bytes a row; the plain PyTorch search moves some 40 bytes a weight for every ratio. About
ratios * (2 * levels + 4) arithmetic operations a weight, so below 4 bits it is bound by memory.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from loftq.ops.triton.grid import HALF_EVEN

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


@triton.jit
def _search_integer(  # type: ignore[no-untyped-def]  # arguments are Triton's
    x_ptr, widest_ptr, zero_ptr, best_ptr, best_zero_ptr, ratios_ptr, rows, columns, top,
    SHIFTS: tl.constexpr, RATIOS: tl.constexpr,
    BLOCK_ROWS: tl.constexpr, BLOCK_COLUMNS: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    column = tl.arange(0, BLOCK_COLUMNS)
    inside = (row < rows)[:, None] & (column < columns)[None, :]
    x = tl.load(x_ptr + row[:, None] * columns + column[None, :], inside, 0.0)  # (ROWS, COLUMNS)
    widest = tl.load(widest_ptr + row, row < rows, 1.0)  # (ROWS,)
    zero = tl.load(zero_ptr + row, row < rows, 0.0)
    best, best_zero = widest, zero
    best_error = tl.full((BLOCK_ROWS,), float("inf"), tl.float32)
    for k in range(RATIOS):
        scale = widest * tl.load(ratios_ptr + k)
        unit = x / scale[:, None]
        for shift in tl.static_range(SHIFTS):
            z = tl.minimum(tl.maximum(zero + shift, 0.0), top)
            code = tl.minimum(tl.maximum(unit + z[:, None], 0.0), top)
            code = (code + HALF_EVEN) - HALF_EVEN
            difference = tl.where(inside, x - (code - z[:, None]) * scale[:, None], 0.0)
            error = tl.sum(difference * difference, 1)
            better = error < best_error
            best = tl.where(better, scale, best)
            best_zero = tl.where(better, z, best_zero)
            best_error = tl.minimum(error, best_error)
    tl.store(best_ptr + row, best, row < rows)
    tl.store(best_zero_ptr + row, best_zero, row < rows)


def search_integer_scales(
    x: Tensor, widest: Tensor, zeros: Tensor, ratios: Tensor, *, top: int, shifts: int
) -> tuple[Tensor, Tensor]:
    """Best scale among ratios * widest and best zero of each row; all float32 and contiguous.

    Args:
        x: (rows, columns), columns <= MAX_COLUMNS.
        widest: (rows,), the scale that clips nothing.
        zeros: (rows,), the zero that belongs to it.
        ratios: (k,) multiples to try.
        top: largest code.
        shifts: zeros, zeros + 1, .. to try.

    Returns:
        (scales (rows,), zeros (rows,)) float32.
    """
    rows, columns = x.shape
    best, best_zeros = torch.empty_like(widest), torch.empty_like(zeros)
    block_columns = triton.next_power_of_2(columns)
    block_rows = max(1, BLOCK_WEIGHTS // block_columns)
    with torch.cuda.device_of(x):
        _search_integer[(triton.cdiv(rows, block_rows),)](
            x, widest, zeros, best, best_zeros, ratios, rows, columns, float(top),
            SHIFTS=shifts, RATIOS=len(ratios), BLOCK_ROWS=block_rows,
            BLOCK_COLUMNS=block_columns, enable_fp_fusion=False,
        )  # fmt: skip
    return best, best_zeros
