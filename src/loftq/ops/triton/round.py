"""Nearest codes of grouped weights under stored scales, and the values they stand for, in one pass.

Computes, for each weight x of a group with scale s (and zero z),

    codebook    code = number of bounds below x / s (lower on a tie)      value = s * level
    integer     code = clamp(round_half_even(x / s + z), 0, 2^bits - 1)  value = (code - z) * s

Reads 4 bytes a weight and writes 5: bound by memory. Divisions are IEEE and nothing is fused, so
that codes and values are bit for bit those of formats/grids.py.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from loftq.ops.triton.grid import nearest

BLOCK_WEIGHTS = 4096
MAX_COLUMNS = 256  # of a group; longer rows are cut


@triton.jit
def _round(  # type: ignore[no-untyped-def]  # arguments are Triton's
    x_ptr, scale_ptr, zero_ptr, levels_ptr, codes_ptr, values_ptr,
    rows, columns, tiny, top,
    LEVELS: tl.constexpr, BLOCK_ROWS: tl.constexpr, BLOCK_COLUMNS: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    column = tl.program_id(1) * BLOCK_COLUMNS + tl.arange(0, BLOCK_COLUMNS)
    inside = (row < rows)[:, None] & (column < columns)[None, :]
    at = row[:, None] * columns + column[None, :]  # (BLOCK_ROWS, BLOCK_COLUMNS)
    x = tl.load(x_ptr + at, inside, 0.0)
    scale = tl.load(scale_ptr + row, row < rows, 1.0)[:, None]
    zero = tl.load(zero_ptr + row, row < rows, 0.0)[:, None]
    codes, values = nearest(x, scale, zero, levels_ptr, tiny, top, LEVELS)
    tl.store(codes_ptr + at, codes.to(tl.uint8), inside)
    tl.store(values_ptr + at, values, inside)


def round_rows(
    x: Tensor, scales: Tensor, zeros: Tensor | None, levels: Tensor | None, *, top: int, tiny: float
) -> tuple[Tensor, Tensor]:
    """Codes and values of rows that are one group each; all float32, contiguous, on one device.

    Args:
        x: (rows, columns).
        scales: (rows,); 0 divides as `tiny`.
        zeros: (rows,) of an integer grid, else None.
        levels: (n,) codebook, ascending, or None for an integer grid.
        top: largest code of an integer grid.

    Returns:
        (codes (rows, columns) uint8, values (rows, columns) float32).
    """
    rows, columns = x.shape
    codes, values = torch.empty_like(x, dtype=torch.uint8), torch.empty_like(x)
    block_columns = min(MAX_COLUMNS, triton.next_power_of_2(columns))
    block_rows = BLOCK_WEIGHTS // block_columns
    with torch.cuda.device_of(x):
        _round[(triton.cdiv(rows, block_rows), triton.cdiv(columns, block_columns))](
            x, scales, scales if zeros is None else zeros, scales if levels is None else levels,
            codes, values, rows, columns, tiny, float(top),
            LEVELS=0 if levels is None else len(levels),
            BLOCK_ROWS=block_rows, BLOCK_COLUMNS=block_columns, enable_fp_fusion=False,
        )  # fmt: skip
    return codes, values
