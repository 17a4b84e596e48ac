"""Groups of weights handed to the library: their scales, codes under them, packed codes."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from functools import lru_cache

import torch
from torch import Tensor

from loftq.ops.columns import LEAST_SCALE
from loftq.ops.cpu.library import Grid, ready


def fit_scales(
    x: Tensor, levels: Tensor | None, ratios: Sequence[float], *, top: int, shifts: int = 1
) -> tuple[Tensor, Tensor | None]:
    """`scale_search.fit_scales_reference` to the bit; x contiguous, on the CPU."""
    library, team = ready()
    scales = x.new_empty(len(x))
    zeros = None if levels is not None else x.new_empty(len(x))
    if x.numel():
        grid = make_grid(levels, x.shape[-1], top, tuple(ratios), shifts)
        library.check(
            library.functions.loftq_fit(
                ctypes.byref(team), ctypes.byref(grid), x.data_ptr(), len(x),
                scales.data_ptr(), None if zeros is None else zeros.data_ptr(),
            )
        )  # fmt: skip
    return scales, zeros


def round_rows(
    x: Tensor,
    scale: Tensor,
    zero: Tensor | None,
    levels: Tensor | None,
    *,
    top: int,
    tiny: float = LEAST_SCALE,
) -> tuple[Tensor, Tensor]:
    """(codes uint8, values float32) of x (rows, columns), as `columns.nearest` has them to the bit.

    Args:
        x: float32, contiguous, on the CPU; a group in each row.
        scale: (rows,) float32 as stored.
        zero: (rows,) float32 of an integer grid, else None.
        levels: (top + 1,) float32 codebook, ascending, or None for an integer grid.
        top: largest code.
        tiny: what a scale of 0 divides as.
    """
    library, team = ready()
    codes, values = torch.empty_like(x, dtype=torch.uint8), torch.empty_like(x)
    if x.numel():
        grid = make_grid(levels, x.shape[-1], top, (), 1, tiny)
        scale, zero = scale.contiguous(), None if zero is None else zero.contiguous()
        library.check(
            library.functions.loftq_round(
                ctypes.byref(team), ctypes.byref(grid), x.data_ptr(), len(x), scale.data_ptr(),
                None if zero is None else zero.data_ptr(), codes.data_ptr(), values.data_ptr(),
            )
        )  # fmt: skip
    return codes, values


def pack_codes(codes: Tensor, bits: int, row_bytes: int) -> Tensor:
    """Packed rows (..., row_bytes) uint8 of codes (..., columns) uint8, both in C order."""
    library, team = ready()
    codes = codes.contiguous()
    packed = codes.new_empty(*codes.shape[:-1], row_bytes)
    if codes.numel():
        columns = codes.shape[-1]
        library.check(
            library.functions.loftq_pack(
                ctypes.byref(team), codes.data_ptr(), codes.numel() // columns, columns, bits,
                packed.data_ptr(),
            )
        )  # fmt: skip
    return packed


def make_grid(
    levels: Tensor | None,
    columns: int,
    top: int,
    ratios: tuple[float, ...],
    shifts: int,
    tiny: float = LEAST_SCALE,
) -> Grid:
    """A Grid, with hold of its levels and ratios."""
    book = None if levels is None else levels.data_ptr()
    tried = _floats(ratios)
    grid = Grid(book, ctypes.addressof(tried), columns, top, len(ratios), shifts, tiny)
    grid.borrowed = (levels, tried)
    return grid


@lru_cache
def _floats(values: tuple[float, ...]) -> ctypes.Array[ctypes.c_float]:
    return (ctypes.c_float * len(values))(*values)
