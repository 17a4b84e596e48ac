"""Bytes to codes and scales inside a kernel; the layout is ops/reference.py's.

Codes come by shifts and masks on whole bytes, without inline assembly, so that the interpreter, AMD
and NVIDIA run the same code.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def unpack(  # type: ignore[no-untyped-def]  # arguments are Triton's
    row_ptr, first, columns,
    BITS: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, WHOLE: tl.constexpr,
):  # fmt: skip
    """Codes (ROWS, COLUMNS) int32 of the columns first .. first + COLUMNS of packed rows.

    row_ptr: (ROWS, 1) pointers to the first byte of each row, or of row 0 where a row is outside.
    first: multiple of 8. Columns beyond the last of a row give the codes of other bytes.
    WHOLE: whether there are none; without a mask, which Triton cannot align, loads are wide.
    """
    if BITS == 8:
        codes = _plane(row_ptr, 0, first, columns, 8, ROWS, COLUMNS, WHOLE)
    elif BITS == 3:
        low = _plane(row_ptr, 0, first, columns, 2, ROWS, COLUMNS, WHOLE)
        high = _plane(row_ptr, (columns + 3) // 4, first, columns, 1, ROWS, COLUMNS, WHOLE)
        codes = low | (high << 2)
    else:
        codes = _plane(row_ptr, 0, first, columns, BITS, ROWS, COLUMNS, WHOLE)
    return codes


@triton.jit
def _plane(  # type: ignore[no-untyped-def]
    row_ptr, start, first, columns,
    WIDTH: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, WHOLE: tl.constexpr,
):  # fmt: skip
    PER_BYTE: tl.constexpr = 8 // WIDTH
    BYTES: tl.constexpr = COLUMNS // PER_BYTE
    at = first // PER_BYTE + tl.arange(0, BYTES)
    if WHOLE:
        stored = tl.load(row_ptr + start + at[None, :]).to(tl.int32)
    else:
        inside = at < (columns + PER_BYTE - 1) // PER_BYTE
        stored = tl.load(row_ptr + start + at[None, :], inside[None, :], 0).to(tl.int32)
    shift = tl.arange(0, PER_BYTE) * WIDTH
    codes = (stored[:, :, None] >> shift[None, None, :]) & ((1 << WIDTH) - 1)
    return tl.reshape(codes, (ROWS, COLUMNS))  # (ROWS, BYTES, PER_BYTE), low bits first


@triton.jit
def unpack_at(row_ptr, at, columns, BITS: tl.constexpr):  # type: ignore[no-untyped-def]
    """Codes of single columns `at`, a block of any shape; pointers and columns must be inside."""
    if BITS == 3:
        low = (tl.load(row_ptr + at // 4).to(tl.int32) >> (at % 4 * 2)) & 3
        high = tl.load(row_ptr + (columns + 3) // 4 + at // 8).to(tl.int32) >> (at % 8)
        codes = low | ((high & 1) << 2)
    else:
        PER_BYTE: tl.constexpr = 8 // BITS
        stored = tl.load(row_ptr + at // PER_BYTE).to(tl.int32)
        codes = (stored >> (at % PER_BYTE * BITS)) & ((1 << BITS) - 1)
    return codes


@triton.jit
def decode_scale(scale_ptr, nested_ptr, map_ptr, at, NESTED: tl.constexpr):  # type: ignore[no-untyped-def]
    """Scales float32 number `at` (row * groups + group); nested coding, or a float pointer."""
    if NESTED:
        code = tl.load(scale_ptr + at).to(tl.int32)
        absmax = tl.load(nested_ptr + 1 + at // 256)
        scales = tl.load(map_ptr + code) * absmax + tl.load(nested_ptr)
    else:
        scales = tl.load(scale_ptr + at).to(tl.float32)
    return scales
