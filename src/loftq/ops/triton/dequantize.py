"""Packed rows to a dense weight: w = scale * (value(code) - zero), rounded as the reference rounds.

Reads the packed bytes (schema.dequantize) once and writes 2 or 4 bytes a weight once: bound by
memory, nine tenths of it the writes. Codebook levels are gathered from one cache line; scales are
decoded per group, in float32 and without fused multiply-adds, so that the values are bit for bit
those of ops/reference.py.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from loftq.ops.reference import SCALE_DTYPES, dynamic_map, view_bytes
from loftq.ops.triton.bits import decode_scale, unpack, unpack_at

BLOCK_WEIGHTS = 4096
BLOCK_COLUMNS = 256  # of one program: a multiple of every group size


@triton.jit
def _dequantize(  # type: ignore[no-untyped-def]  # arguments are Triton's
    packed_ptr, scale_ptr, zero_ptr, nested_ptr, map_ptr, levels_ptr, out_ptr,
    start, rows, columns, groups, row_bytes, zero_row_bytes, default_zero,
    BITS: tl.constexpr, GROUP: tl.constexpr, NESTED: tl.constexpr,
    CODEBOOK: tl.constexpr, ZEROS: tl.constexpr,
    BLOCK_ROWS: tl.constexpr, BLOCK_COLUMNS: tl.constexpr, WHOLE: tl.constexpr,
):  # fmt: skip
    row_out = tl.program_id(0).to(tl.int64) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    row = row_out
    if start is not None:
        row += start
    first = tl.program_id(1) * BLOCK_COLUMNS
    column = first + tl.arange(0, BLOCK_COLUMNS)
    here = tl.minimum(row, rows - 1)  # rows outside read the last one, and write nothing
    codes = unpack(
        packed_ptr + here[:, None] * row_bytes,
        first,
        columns,
        BITS,
        BLOCK_ROWS,
        BLOCK_COLUMNS,
        WHOLE,
    )  # (BLOCK_ROWS, BLOCK_COLUMNS)
    if CODEBOOK:
        values = tl.load(levels_ptr + codes)
    else:
        values = codes.to(tl.float32)
    SPANS: tl.constexpr = BLOCK_COLUMNS // GROUP if GROUP > 0 else 1  # groups in this block
    if GROUP > 0:
        group = tl.minimum(first // GROUP + tl.arange(0, SPANS), groups - 1)
    else:
        group = tl.zeros((1,), tl.int32)
    at = here[:, None] * groups + group[None, :]  # (BLOCK_ROWS, SPANS)
    scales = decode_scale(scale_ptr, nested_ptr, map_ptr, at, NESTED)
    values = tl.reshape(values, (BLOCK_ROWS, SPANS, BLOCK_COLUMNS // SPANS))
    if ZEROS:
        zeros = unpack_at(zero_ptr + here[:, None] * zero_row_bytes, group[None, :], groups, BITS)
        values = values - zeros.to(tl.float32)[:, :, None]
    else:
        values = values - default_zero
    values = tl.reshape(values * scales[:, :, None], (BLOCK_ROWS, BLOCK_COLUMNS))
    place = out_ptr + row_out[:, None] * columns + column[None, :]
    inside = (row < rows)[:, None] & (column < columns)[None, :]
    tl.store(place, values.to(out_ptr.dtype.element_ty), inside)


def dequantize(
    packed: Tensor,
    scale: Tensor,
    zero: Tensor | None,
    nested: Tensor | None,
    in_features: int,
    bits: int,
    group_size: int,
    scale_coding: str,
    levels: Sequence[float],
    default_zero: float,
    dtype: torch.dtype,
    *,
    start: int = 0,
    out: Tensor | None = None,
) -> Tensor:
    """Weights (out_features, in_features) in `dtype`; arguments as in `schema.dequantize`.

    One scale for the whole tensor (group_size = -1) is not held: dispatch.py says so.

    Args:
        start: the first row that is wanted.
        out: where they go, contiguous (rows from there on, in_features) of `dtype`; None = a new
            tensor, for all of the others.
    """
    # Mixed-precision wrappers may have cast the bytes; 0..255 survive any float dtype we meet.
    packed, scale = packed.to(torch.uint8).contiguous(), scale.to(torch.uint8).contiguous()
    zero = None if zero is None else zero.to(torch.uint8).contiguous()
    nested = None if nested is None else nested.to(torch.uint8)
    if out is None:
        shape = (packed.shape[0] - start, in_features)
        out = torch.empty(shape, dtype=dtype, device=packed.device)
    assert out.is_contiguous()
    assert (out.dtype, out.shape[1]) == (dtype, in_features)
    rows = out.shape[0]
    if not out.numel():
        return out
    block_rows = BLOCK_WEIGHTS // BLOCK_COLUMNS
    table, codebook = _tables(tuple(levels), packed.device)
    scales = scale if nested is not None else view_bytes(scale, SCALE_DTYPES[scale_coding])
    groups = scales.shape[-1]
    grid = (triton.cdiv(rows, block_rows), triton.cdiv(in_features, BLOCK_COLUMNS))
    with torch.cuda.device_of(packed):
        _dequantize[grid](
            packed, scales, packed if zero is None else zero,
            table if nested is None else view_bytes(nested, torch.float32), table, codebook, out,
            start or None, start + rows, in_features, groups, packed.shape[1],
            0 if zero is None else zero.shape[1], default_zero,
            BITS=bits, GROUP=group_size, NESTED=nested is not None, CODEBOOK=bool(levels),
            ZEROS=zero is not None, BLOCK_ROWS=block_rows, BLOCK_COLUMNS=BLOCK_COLUMNS,
            WHOLE=in_features % BLOCK_COLUMNS == 0, enable_fp_fusion=False,
        )  # fmt: skip
    return out


@lru_cache
def _tables(levels: tuple[float, ...], device: torch.device) -> tuple[Tensor, Tensor]:
    """The nested coding's map and the codebook (its place held by the map where there is none)."""
    table = dynamic_map().to(device)
    return table, torch.tensor(levels, dtype=torch.float32).to(device) if levels else table
