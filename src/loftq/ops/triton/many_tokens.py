# mypy: disable-error-code="assignment,unreachable"
"""y = x W^T for some hundred tokens, from the packed bytes (schema.quant_linear).

Reads the stored layout (ops/reference.py) once for every TOKENS tokens. The bound it aims for is
the tensor cores; beside them the integer units decode. How it works:

- y^T = W x^T: the weights are the left operand of the warp group's matrix instruction (wgmma),
  which it takes from registers, so a decoded weight never travels through shared memory. Only x
  does, by asynchronous copies that run ahead.
- A program owns 16 rows of W for each of its warps and TOKENS tokens, so that a weight is decoded
  once for up to 256 tokens. Matrix instructions are asynchronous: the next 16 columns are decoded
  while the tensor cores multiply. There is no split of the columns, no atomics, one order of sums.
- Columns are summed in the order of places of ops/triton/linear.py: a lane decodes the 16
  neighbouring columns of one load. Here x meets that order in memory, rewritten by a small kernel
  first, since copies move 16 bytes at a time.
- Scales multiply the levels before the product, in float32 (or packed in x's dtype, `multiply`):
  a lane decodes those of its two rows itself, a tile ahead, so nothing is exchanged.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from loftq.ops.reference import SCALE_DTYPES, view_bytes
from loftq.ops.triton.bits import unpack_at
from loftq.ops.triton.levels import level_asm
from loftq.ops.triton.linear import _decode, _tables, _tile_group

PAIRS = {torch.bfloat16: "mul.rn.bf16x2 $0, $1, $2;", torch.float16: "mul.rn.f16x2 $0, $1, $2;"}
"""Products of two neighbouring weights with their scale."""


@triton.jit
def _place(  # type: ignore[no-untyped-def]  # arguments are Triton's
    x_ptr, out_ptr, columns,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """Columns of one token to the order of places: place (g i j q1 q0 l) of each 64."""
    row = tl.program_id(0).to(tl.int64) * columns
    place = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    p = place % 64
    column = p // 2 % 4 * 16 + p // 32 * 8 + p // 16 % 2 * 4 + p // 8 % 2 * 2 + p % 2
    inside = place < columns
    x = tl.load(x_ptr + row + (place - p + column), inside)
    tl.store(out_ptr + row + place, x, inside)


@triton.jit
def _scale(  # type: ignore[no-untyped-def]
    code, at, nested_ptr, map_ptr, offset, NESTED: tl.constexpr
):  # fmt: skip
    """Scales float32 of stored ones, number `at` (row * groups + group)."""
    if NESTED:
        absmax = tl.load(nested_ptr + 1 + at // 256)
        scale = tl.load(map_ptr + code.to(tl.int32)) * absmax + offset
    else:
        scale = code.to(tl.float32)
    return scale


@triton.jit
def _spread(values, WARPS: tl.constexpr):  # type: ignore[no-untyped-def]
    """One value for each (h w r, q) to (16 WARPS, 64), in the places of that lane."""
    spread = tl.broadcast_to(values[:, None], (64 * WARPS, 16))
    spread = tl.reshape(spread, (2, WARPS, 8, 4, 2, 2, 2, 2))  # (h, w, r, q, g, i, j, l)
    return tl.reshape(tl.permute(spread, (1, 0, 2, 4, 5, 6, 3, 7)), (16 * WARPS, 64))


@triton.jit(do_not_specialize=["tokens", "apart"])
def _product(  # type: ignore[no-untyped-def]
    x_ptr, word_ptr, high_ptr, scale_ptr, zero_ptr, nested_ptr, map_ptr, table_ptr, y_ptr,
    rows, tokens, columns, groups, row_bytes, zero_row_bytes, apart,
    BITS: tl.constexpr, GROUP: tl.constexpr, NESTED: tl.constexpr, ZEROS: tl.constexpr,
    ASM: tl.constexpr, MULTIPLY: tl.constexpr, WARPS: tl.constexpr, TOKENS: tl.constexpr,
    STAGES: tl.constexpr,
):  # fmt: skip
    TYPE: tl.constexpr = x_ptr.dtype.element_ty
    UNIT: tl.constexpr = 8 if BITS == 4 else 16
    G: tl.constexpr = 16 // UNIT  # words of a tile in one lane
    STEP: tl.constexpr = 64 // UNIT  # words of a tile in one row
    ROWS: tl.constexpr = 16 * WARPS
    first_row = tl.program_id(1) * ROWS
    token = tl.program_id(0) * TOKENS + tl.arange(0, TOKENS)
    last = columns // 64 - 1
    # Words by (h w r q, g): row 16 w + 8 h + r, word G q + g of the tile.
    e = tl.arange(0, 64 * WARPS)
    q = e % 4 * apart
    row = first_row + e // 32 % WARPS * 16 + e // (32 * WARPS) * 8 + e // 4 % 8
    row = tl.minimum(row, rows - 1).to(tl.int64)  # rows outside read the last, write nothing
    unit = (q * G)[:, None] + tl.arange(0, G)[None, :]
    wp = word_ptr + ((row * row_bytes)[:, None] // 4 + unit)
    hp = high_ptr + ((row * row_bytes + columns // 4)[:, None] // 2 + unit)
    tp = table_ptr + q[:, None]
    table = (
        tl.load(tp), tl.load(tp + 4), tl.load(tp + 8), tl.load(tp + 12),
        tl.load(tp + 16), tl.load(tp + 20), tl.load(tp + 24), tl.load(tp + 28),
    )  # fmt: skip
    at = row * groups
    offset = tl.load(nested_ptr)
    # Words are loaded a tile ahead, scales loaded two ahead and decoded one ahead. Nothing may be
    # carried through an iteration unchanged: Triton would not pipeline the copies of x.
    word = tl.load(wp)
    high = tl.load(hp) if BITS == 3 else word
    scale = _scale(tl.load(scale_ptr + at), at, nested_ptr, map_ptr, offset, NESTED)
    next_code = tl.load(scale_ptr + at + _tile_group(tl.minimum(1, last), groups, GROUP))
    # x in the order of places, tokens outside as the last one.
    xp = x_ptr + tl.minimum(token, tokens - 1).to(tl.int64)[None, :] * columns
    xp = xp + tl.arange(0, 64)[:, None]
    acc = tl.zeros((ROWS, TOKENS), tl.float32)
    # At least one tile, said so: else ptxas would let each matrix instruction wait for the last.
    for tile in tl.range(0, tl.maximum(last + 1, 1), num_stages=STAGES):
        near, far = tl.minimum(tile + 1, last), tl.minimum(tile + 2, last)
        next_word = tl.load(wp + near * STEP)
        next_high = tl.load(hp + near * STEP) if BITS == 3 else next_word
        next_at = at + _tile_group(near, groups, GROUP)
        if NESTED:
            far_code = tl.load(scale_ptr + at + _tile_group(far, groups, GROUP))
        else:
            far_code = tl.load(scale_ptr + next_at)
            next_code = far_code
        next_scale = _scale(next_code, next_at, nested_ptr, map_ptr, offset, NESTED)
        x = tl.load(xp)  # (64, TOKENS)
        levels = tl.reshape(_decode(word, high, table, BITS, ASM, TYPE, 2, WARPS, 16), (ROWS, 64))
        if ZEROS:
            group = _tile_group(tile, groups, GROUP)
            zero = unpack_at(zero_ptr + row * zero_row_bytes, group, groups, BITS)
            levels -= _spread(zero.to(tl.float32).to(TYPE), WARPS)  # exact: small integers
        if MULTIPLY == "":
            weight = (levels.to(tl.float32) * _spread(scale, WARPS)).to(TYPE)
        else:
            spread = _spread(scale.to(TYPE), WARPS).to(tl.int16, bitcast=True)
            weight = tl.inline_asm_elementwise(
                MULTIPLY, "=r,r,r", [levels.to(tl.int16, bitcast=True), spread],
                dtype=tl.int16, is_pure=True, pack=2,
            ).to(TYPE, bitcast=True)  # fmt: skip
        acc = tl.dot(weight, x, acc)
        xp += 64
        word, high, scale, next_code = next_word, next_high, next_scale, far_code
    row_out = first_row + tl.arange(0, ROWS)
    place = y_ptr + token.to(tl.int64)[None, :] * rows + row_out[:, None]
    tl.store(place, acc.to(TYPE), (row_out < rows)[:, None] & (token < tokens)[None, :])


@dataclass(frozen=True, kw_only=True)
class Launch:
    """Shape of one launch."""

    warps: int = 8
    """4, 8 or 16: 16 rows of W each. x is read again for every 16 rows of all of them."""
    tokens: int = 256
    """Tokens per program: 64, 128 or 256."""
    stages: int = 4
    """Tiles of x in shared memory, 128 bytes a token each."""
    multiply: bool = False
    """Whether scales are rounded to x's dtype and multiply there: fewer instructions, one more
    rounding."""


def choose_launch(tokens: int) -> Launch:
    """The launch for so many tokens."""
    return Launch(tokens=128) if tokens <= 128 else Launch()


def many_tokens_linear(
    x: Tensor,
    packed: Tensor,
    scale: Tensor,
    zero: Tensor | None,
    nested: Tensor | None,
    bits: int,
    group_size: int,
    scale_coding: str,
    levels: Sequence[float],
    default_zero: float,
    *,
    launch: Launch | None = None,
) -> Tensor:
    """x W^T for x (tokens, in_features), float16 or bfloat16.

    Arguments as in `schema.quant_linear`, in the formats that `linear.small_linear`'s fast decode
    holds: 2 to 4 bits, groups of a multiple of 64 or whole rows, in_features a multiple of 64.
    """
    x = x.contiguous()
    (tokens, columns), rows = x.shape, packed.shape[0]
    launch = launch or choose_launch(tokens)
    minus = 0.0 if zero is not None else default_zero
    values = tuple(levels) or tuple(code - minus for code in range(2**bits))
    table, _, words = _tables(values, x.dtype, x.device)
    scales = scale if nested is not None else view_bytes(scale, SCALE_DTYPES[scale_coding])
    y = torch.empty((tokens, rows), dtype=x.dtype, device=x.device)
    if not y.numel():
        return y
    with torch.cuda.device_of(x):
        places = torch.empty_like(x)
        _place[(tokens, triton.cdiv(columns, 1024))](x, places, columns, BLOCK=1024, num_warps=4)
        grid = (triton.cdiv(tokens, launch.tokens), triton.cdiv(rows, 16 * launch.warps))
        _product[grid](
            places, packed.view(torch.int32), packed.view(torch.int16) if bits == 3 else packed,
            scales, packed if zero is None else zero,
            table if nested is None else view_bytes(nested, torch.float32), table, words, y,
            rows, tokens, columns, scales.shape[-1], packed.shape[1],
            0 if zero is None else zero.shape[1], 1,
            BITS=bits, GROUP=group_size, NESTED=nested is not None, ZEROS=zero is not None,
            ASM=level_asm(bits), MULTIPLY=PAIRS[x.dtype] if launch.multiply else "",
            WARPS=launch.warps, TOKENS=launch.tokens, STAGES=launch.stages, num_warps=launch.warps,
        )  # fmt: skip
    return y
