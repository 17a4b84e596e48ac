# mypy: disable-error-code="assignment,unreachable"
"""y = x W^T + s (x A^T) B^T for at most 64 tokens, from the packed bytes (schema.quant_linear).

Reads the stored layout (ops/reference.py) once. The bound it aims for is memory; what it meets
first is the integer units, which decode (docs/kernels.md: bounds and measured rows). How it works:

- The weights are the left operand of the matrix instruction, so that they stay in the registers
  they were decoded in. A tile is 64 columns; a warp takes tiles of its own (the batch dimension of
  the product), so warps meet only once, when their partial sums are added in a fixed order. There
  are no atomics, and results are the same on every run.
- Columns may be summed in any order if x has the same one. Place p of a tile (bits, high to low:
  g j q1 q0 i l; with OPERAND_WIDTH 2, g i j q1 q0 l) holds column 16 q + 8 g + 4 i + 2 j + l: lane
  q of a row then owns 16 neighbouring columns, which are one load of words and one of x. Loads are
  indexed by these coordinates, lanes fastest, so the layout that Triton gives them is the
  operand's, and nothing moves between threads. `apart` hides from it that lanes' addresses follow
  each other: it would join them up.
- Levels are exact in x's dtype or rounded to it; scales are applied in float32 to the sums of a
  tile, zeros by the sum of x.

The portable decode (ASM = "") reads single codes, for any number of columns and any group; it is
what the interpreter runs.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from loftq.ops.few_tokens import Member
from loftq.ops.reference import SCALE_DTYPES, dynamic_map, view_bytes
from loftq.ops.triton.bits import decode_scale, unpack_at
from loftq.ops.triton.levels import level_asm, level_words
from loftq.ops.triton.overlap import options

OPERAND_WIDTH = 4 if tuple(map(int, triton.__version__.split(".")[:2])) < (3, 8) else 2
"""Neighbouring places of a row in one lane: what Triton chooses for operands that were joined."""
PARTS = 8  # partial sums of x A^T along in_features

_FOUR = tl.constexpr(",".join(["=h"] * 8 + ["r"] * 9))
_THREE = tl.constexpr(",".join(["=h"] * 16 + ["r", "h"] + ["r"] * 4))
_TWO = tl.constexpr(",".join(["=h"] * 16 + ["r"] * 5))


@triton.jit
def _fold(o0, o1, o2, o3, o4, o5, o6, o7):  # type: ignore[no-untyped-def]
    """Eight blocks, one per code, to one with dimensions (..., j, l, i): code = 4 i + 2 j + l."""
    low = tl.join(tl.join(o0, o2), tl.join(o1, o3))
    return tl.join(low, tl.join(tl.join(o4, o6), tl.join(o5, o7)))


@triton.jit
def _decode(  # type: ignore[no-untyped-def]
    word, high, t,
    BITS: tl.constexpr, ASM: tl.constexpr, TYPE: tl.constexpr, WIDTH: tl.constexpr,
    BATCH: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """Levels (BATCH, ROWS, 64) of words (h b r q, g), in the order of places."""
    H: tl.constexpr = ROWS // 8
    if BITS == 4:
        o = tl.inline_asm_elementwise(
            ASM, _FOUR, [word, t[0], t[1], t[2], t[3], t[4], t[5], t[6], t[7]],
            dtype=(tl.int16, tl.int16, tl.int16, tl.int16, tl.int16, tl.int16, tl.int16, tl.int16),
            is_pure=True, pack=1,
        )  # fmt: skip
        levels = _fold(o[0], o[1], o[2], o[3], o[4], o[5], o[6], o[7])
        levels = tl.reshape(levels, (H, BATCH, 8, 4, 2, 2, 2, 2))  # (h, b, r, q, g, j, l, i)
        if WIDTH == 4:
            levels = tl.permute(levels, (1, 0, 2, 4, 5, 3, 7, 6))
        else:
            levels = tl.permute(levels, (1, 0, 2, 4, 7, 5, 3, 6))
    else:
        if BITS == 3:
            o = tl.inline_asm_elementwise(
                ASM, _THREE, [word, high, t[0], t[1], t[4], t[5]],
                dtype=(tl.int16, tl.int16, tl.int16, tl.int16, tl.int16, tl.int16, tl.int16,
                       tl.int16, tl.int16, tl.int16, tl.int16, tl.int16, tl.int16, tl.int16,
                       tl.int16, tl.int16),
                is_pure=True, pack=1,
            )  # fmt: skip
        else:
            o = tl.inline_asm_elementwise(
                ASM, _TWO, [word, t[0], t[1], t[4], t[5]],
                dtype=(tl.int16, tl.int16, tl.int16, tl.int16, tl.int16, tl.int16, tl.int16,
                       tl.int16, tl.int16, tl.int16, tl.int16, tl.int16, tl.int16, tl.int16,
                       tl.int16, tl.int16),
                is_pure=True, pack=1,
            )  # fmt: skip
        lower = _fold(o[0], o[1], o[2], o[3], o[4], o[5], o[6], o[7])
        upper = _fold(o[8], o[9], o[10], o[11], o[12], o[13], o[14], o[15])
        levels = tl.join(lower, upper)
        levels = tl.reshape(levels, (H, BATCH, 8, 4, 2, 2, 2, 2))  # (h, b, r, q, j, l, i, g)
        if WIDTH == 4:
            levels = tl.permute(levels, (1, 0, 2, 7, 4, 3, 6, 5))
        else:
            levels = tl.permute(levels, (1, 0, 2, 7, 6, 4, 3, 5))
    return tl.reshape(levels, (BATCH, ROWS, 64)).to(TYPE, bitcast=True)


@triton.jit
def _tile_group(tile, groups, GROUP: tl.constexpr):  # type: ignore[no-untyped-def]
    """The group of a tile's columns; the last one for tiles beyond the row."""
    return tl.minimum(tile * 64 // GROUP, groups - 1) if GROUP > 0 else tile * 0


@triton.jit
def _lora(  # type: ignore[no-untyped-def]
    acc, ax_ptr, b_ptr, row, token, tokens, rank,
    BATCH: tl.constexpr, ROWS: tl.constexpr, TOKENS: tl.constexpr, PARTS: tl.constexpr,
    TYPE: tl.constexpr,
):  # fmt: skip
    """acc (BATCH, ROWS, TOKENS) + B ax, each warp over 16 columns of B at a time."""
    for start in tl.range(0, rank, BATCH * 16, num_stages=1):
        at = start + tl.arange(0, BATCH)[:, None] * 16 + tl.arange(0, 16)[None, :]  # (BATCH, 16)
        inside = at < rank
        b = tl.load(b_ptr + row[None, :, None] * rank + at[:, None, :], inside[:, None, :], 0.0)
        place = token[None, None, :] * rank + at[:, :, None]  # (BATCH, 16, TOKENS)
        inside = inside[:, :, None] & (token < tokens)[None, None, :]
        ax = tl.zeros((BATCH, 16, TOKENS), tl.float32)
        for part in tl.static_range(PARTS):
            ax += tl.load(ax_ptr + part * tokens * rank + place, inside, 0.0)
        acc += tl.dot(b.to(TYPE), ax.to(TYPE))
    return acc


@triton.jit
def _of_member(values, member):  # type: ignore[no-untyped-def]
    """values[member], for pointers or numbers."""
    chosen = values[0]
    for i in tl.static_range(1, len(values)):
        chosen = tl.where(member == i, values[i], chosen)
    return chosen


@triton.jit
def _member_of(block, sizes, SIZE: tl.constexpr):  # type: ignore[no-untyped-def]
    """(member, its block, rows before it) of a block of SIZE rows; members start new blocks."""
    member, first, before = 0, 0, 0
    start, rows = 0, 0
    for i in tl.static_range(0, len(sizes) - 1):
        start += tl.cdiv(sizes[i], SIZE)
        rows += sizes[i]
        member = tl.where(block >= start, i + 1, member)
        first = tl.where(block >= start, start, first)
        before = tl.where(block >= start, rows, before)
    return member, block - first, before


@triton.jit(do_not_specialize=["apart"])
def _linear(  # type: ignore[no-untyped-def]  # arguments are Triton's
    x_ptr, word_ptrs, high_ptrs, packed_ptrs, scale_ptrs, zero_ptrs, nested_ptrs, map_ptr,
    levels_ptr, table_ptr, ax_ptr, b_ptrs, y_ptr, sizes,
    tokens, all_rows, columns, groups, row_bytes, zero_row_bytes, rank, apart,
    BITS: tl.constexpr, GROUP: tl.constexpr, NESTED: tl.constexpr, ZEROS: tl.constexpr,
    ASM: tl.constexpr, WIDTH: tl.constexpr, LORA: tl.constexpr, PARTS: tl.constexpr,
    BATCH: tl.constexpr, ROWS: tl.constexpr, TOKENS: tl.constexpr, AHEAD: tl.constexpr,
    OVERLAP: tl.constexpr,
):  # fmt: skip
    TYPE: tl.constexpr = x_ptr.dtype.element_ty
    UNIT: tl.constexpr = 8 if BITS == 4 else 16
    G: tl.constexpr = 16 // UNIT  # words of a tile in one lane
    H: tl.constexpr = ROWS // 8
    S: tl.constexpr = TOKENS // 8
    STEP: tl.constexpr = BATCH * (64 // UNIT)  # words from a warp's tile to its next
    member, block, before = _member_of(tl.program_id(0), sizes, ROWS)
    rows = _of_member(sizes, member)
    word_ptr, high_ptr = _of_member(word_ptrs, member), _of_member(high_ptrs, member)
    packed_ptr, scale_ptr = _of_member(packed_ptrs, member), _of_member(scale_ptrs, member)
    zero_ptr, nested_ptr = _of_member(zero_ptrs, member), _of_member(nested_ptrs, member)
    b_ptr, ax_ptr = _of_member(b_ptrs, member), ax_ptr + member * (PARTS * tokens * rank)
    first_row = block * ROWS
    first_token = tl.program_id(1) * TOKENS
    row_out = first_row + tl.arange(0, ROWS)
    row = tl.minimum(row_out, rows - 1).to(tl.int64)  # rows outside read the last, write nothing
    token = first_token + tl.arange(0, TOKENS)
    b = tl.arange(0, BATCH)
    tiles = tl.cdiv(columns, 64)
    acc = tl.zeros((BATCH, ROWS, TOKENS), tl.float32)
    if ASM != "":
        # Words by (h b r q, g): row 8 h + r, tile b, word G q + g of the tile.
        e = tl.arange(0, 32 * BATCH * H)
        q = e % 4 * apart
        b5 = (e // 32 % BATCH)[:, None]
        word_row = first_row + e // (32 * BATCH) * 8 + e // 4 % 8
        word_row = tl.minimum(word_row, rows - 1).to(tl.int64) * row_bytes
        unit = (q * G)[:, None] + tl.arange(0, G)[None, :] + b5 * (64 // UNIT)
        wp = word_ptr + (word_row[:, None] // 4 + unit)
        hp = high_ptr + ((word_row[:, None] + columns // 4) // 2 + unit)
        # Each lane loads the table itself: in a uniform register every use would cost a move.
        tp = table_ptr + q[:, None]
        table = (
            tl.load(tp), tl.load(tp + 4), tl.load(tp + 8), tl.load(tp + 12),
            tl.load(tp + 16), tl.load(tp + 20), tl.load(tp + 24), tl.load(tp + 28),
        )  # fmt: skip
        # x by (g s b t q, 4 i + 2 j + l): token 8 s + t.
        e = tl.arange(0, 64 * BATCH * S)
        b6 = (e // 32 % BATCH)[:, None]
        x_token = (first_token + e // (32 * BATCH) % S * 8 + e // 4 % 8)[:, None]
        x_column = (e % 4 * (16 * apart) + e // (32 * BATCH * S) * 8)[:, None] + b6 * 64
        x_column = x_column + tl.arange(0, 8)[None, :]
        xp = x_ptr + (x_token.to(tl.int64) * columns + x_column)
        offset = tl.load(nested_ptr)
        words, highs, codes = (), (), ()
        for d in tl.static_range(AHEAD):
            word = tl.load(wp + d * STEP, d * BATCH + b5 < tiles)
            words = words + (word,)
            highs = highs + (tl.load(hp + d * STEP, d * BATCH + b5 < tiles) if BITS == 3 else word,)
            group = _tile_group(d * BATCH + b, groups, GROUP)
            codes = codes + (tl.load(scale_ptr + row[None, :] * groups + group[:, None]),)
        if OVERLAP:  # the weights are nobody's output
            gdc_wait()
        if LORA:  # first, while the weights are on their way
            acc = _lora(
                acc, ax_ptr, b_ptr, row, token, tokens, rank, BATCH, ROWS, TOKENS, PARTS, TYPE
            )
        for start in tl.range(0, tiles, BATCH * AHEAD, num_stages=1):
            wp += AHEAD * STEP
            hp += AHEAD * STEP
            next_words, next_highs, next_codes = (), (), ()
            for d in tl.static_range(AHEAD):
                tile = start + d * BATCH + b
                ahead = tile + AHEAD * BATCH
                live = b5 + (start + (d + AHEAD) * BATCH) < tiles
                word = tl.load(wp + d * STEP, live)
                next_words = next_words + (word,)
                next_highs = next_highs + (tl.load(hp + d * STEP, live) if BITS == 3 else word,)
                group = _tile_group(ahead, groups, GROUP)
                code = tl.load(scale_ptr + row[None, :] * groups + group[:, None])
                next_codes = next_codes + (code,)
                live = (b6 + (start + d * BATCH) < tiles) & (x_token < tokens)
                x = tl.load(xp + d * (BATCH * 64), live, 0.0)
                x = tl.reshape(x, (2, S, BATCH, 8, 4, 2, 2, 2))  # (g, s, b, t, q, i, j, l)
                if WIDTH == 4:
                    x = tl.permute(x, (2, 0, 6, 4, 5, 7, 1, 3))
                else:
                    x = tl.permute(x, (2, 0, 5, 6, 4, 7, 1, 3))
                x = tl.reshape(x, (BATCH, 64, TOKENS))
                weight = _decode(words[d], highs[d], table, BITS, ASM, TYPE, WIDTH, BATCH, ROWS)
                part = tl.dot(weight, x)
                at = row[None, :] * groups + _tile_group(tile, groups, GROUP)[:, None]
                if NESTED:
                    absmax = tl.load(nested_ptr + 1 + at // 256)
                    scale = tl.load(map_ptr + codes[d].to(tl.int32)) * absmax + offset
                else:
                    scale = codes[d].to(tl.float32)
                if ZEROS:
                    zero_row = zero_ptr + row[None, :] * zero_row_bytes
                    zero = unpack_at(
                        zero_row, _tile_group(tile, groups, GROUP)[:, None], groups, BITS
                    )
                    total = tl.sum(x.to(tl.float32), 1)  # (BATCH, TOKENS)
                    part -= zero.to(tl.float32)[:, :, None] * total[:, None, :]
                acc += part * scale[:, :, None]
            words, highs, codes = next_words, next_highs, next_codes
            xp += AHEAD * BATCH * 64
    else:
        if OVERLAP:
            gdc_wait()
        if LORA:
            acc = _lora(
                acc, ax_ptr, b_ptr, row, token, tokens, rank, BATCH, ROWS, TOKENS, PARTS, TYPE
            )
        column_64 = tl.arange(0, 64)
        for start in tl.range(0, tiles, BATCH, num_stages=1):
            column = (start + b)[:, None] * 64 + column_64[None, :]  # (BATCH, 64)
            inside = column < columns
            here = tl.minimum(column, columns - 1)
            group = here // GROUP if GROUP > 0 else here * 0
            code = unpack_at(
                packed_ptr + (row * row_bytes)[None, :, None], here[:, None, :], columns, BITS
            )
            at = row[None, :, None] * groups + group[:, None, :]
            weight = tl.load(levels_ptr + code)  # (BATCH, ROWS, 64)
            if ZEROS:
                zero_row = zero_ptr + (row * zero_row_bytes)[None, :, None]
                weight -= unpack_at(zero_row, group[:, None, :], groups, BITS).to(tl.float32)
            weight *= decode_scale(scale_ptr, nested_ptr, map_ptr, at, NESTED)
            x = tl.load(
                x_ptr + token[None, None, :].to(tl.int64) * columns + column[:, :, None],
                inside[:, :, None] & (token < tokens)[None, None, :], 0.0,
            )  # fmt: skip
            acc += tl.dot(weight.to(TYPE), x)
    if OVERLAP:
        gdc_launch_dependents()
    y = tl.sum(acc, 0)  # (ROWS, TOKENS)
    place = y_ptr + token[None, :].to(tl.int64) * all_rows + before + row_out[:, None]
    tl.store(place, y.to(TYPE), (row_out < rows)[:, None] & (token < tokens)[None, :])


@triton.jit
def _down(  # type: ignore[no-untyped-def]
    x_ptr, a_ptrs, ax_ptr, scalings, tokens, columns, rank, own_tokens, own_rank,
    BATCH: tl.constexpr, TOKENS: tl.constexpr, PARTS: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    """Part `program_id(1)` of scaling * A x^T for 16 rows of a member's A, float32 (members, PARTS,
    tokens, rank); 0 where a row of stacked adapters is not the token's own."""
    TYPE: tl.constexpr = x_ptr.dtype.element_ty
    STEP: tl.constexpr = PARTS * BATCH * 64
    blocks = tl.cdiv(rank, 16)
    member = tl.program_id(0) // blocks
    row = tl.program_id(0) % blocks * 16 + tl.arange(0, 16)
    token = tl.program_id(2) * TOKENS + tl.arange(0, TOKENS)
    first = tl.program_id(1) * (BATCH * 64)
    column = first + tl.arange(0, BATCH)[:, None] * 64 + tl.arange(0, 64)[None, :]  # (BATCH, 64)
    real = (row < rank)[None, :, None]
    from_ptr = _of_member(a_ptrs, member) + row.to(tl.int64)[None, :, None] * columns
    a = tl.load(from_ptr + column[:, None, :], real & (column < columns)[:, None, :], 0.0)
    if OVERLAP:  # the adapter is nobody's output
        gdc_wait()
    acc = tl.zeros((BATCH, 16, TOKENS), tl.float32)
    for _ in tl.range(first, columns, STEP, num_stages=1):
        x = tl.load(
            x_ptr + token.to(tl.int64)[None, None, :] * columns + column[:, :, None],
            (column < columns)[:, :, None] & (token < tokens)[None, None, :], 0.0,
        )  # fmt: skip
        column += STEP
        inside = real & (column < columns)[:, None, :]
        ahead = tl.load(from_ptr + column[:, None, :], inside, 0.0)
        acc += tl.dot(a.to(TYPE), x)
        a = ahead
    if OVERLAP:
        gdc_launch_dependents()
    part = member * PARTS + tl.program_id(1)
    place = part * tokens * rank + token[None, :] * rank + row[:, None]
    inside = (row < rank)[:, None] & (token < tokens)[None, :]
    own = (row // own_rank)[:, None] == (token // own_tokens)[None, :]
    ax = tl.where(own, tl.sum(acc, 0) * _of_member(scalings, member), 0.0)
    tl.store(ax_ptr + place, ax, inside)


@dataclass(frozen=True, kw_only=True)
class Launch:
    """Shape of one launch; warps equal the batch, so that each has tiles of its own."""

    batch: int
    """Tiles side by side, one per warp."""
    rows: int
    """Rows of W per program: a multiple of 16."""
    tokens: int
    """Tokens per program: 8, 16, 32 or 64."""
    ahead: int
    """Tiles whose words are on their way while one is decoded."""


def choose_launch(bits: int, tokens: int, out_features: int) -> Launch:
    """The fastest launch found on an H100 (docs/kernels.md); elsewhere untested, but right."""
    wide = out_features >= 8192
    if tokens > 16:
        return Launch(batch=4, rows=32, tokens=32, ahead=1 if wide else 2)
    if tokens > 8:
        if wide:
            return Launch(batch=4, rows=32, tokens=16, ahead=2)
        return Launch(batch=4, rows=16, tokens=16, ahead=4)
    if wide:
        return Launch(batch=4, rows=32, tokens=8, ahead=4)
    return Launch(batch=4 if bits == 4 else 8, rows=16, tokens=8, ahead=4)


def small_linear(
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
    lora_A: Tensor | None = None,
    lora_B: Tensor | None = None,
    scaling: float = 1.0,
    *,
    portable: bool = False,
    launch: Launch | None = None,
    overlap: bool = False,
) -> Tensor:
    """x W^T (+ scaling x A^T B^T) for x (tokens, in_features), float16 or bfloat16.

    Arguments as in `schema.quant_linear`; dispatch.py says what the fast decode needs. Keywords as
    in `small_linears`.
    """
    layout = (bits, group_size, scale_coding, levels, default_zero)
    member = Member(packed, scale, zero, nested, layout, lora_A, lora_B, scaling)
    return small_linears(x, (member,), portable=portable, launch=launch, overlap=overlap)


def small_linears(
    x: Tensor,
    members: Sequence[Member],
    *,
    portable: bool = False,
    launch: Launch | None = None,
    overlap: bool = False,
) -> Tensor:
    """`small_linear` of every member, side by side: (tokens, sum of out_features), one launch.

    Args:
        x: (tokens, in_features).
        members: at most MOST_MEMBERS that `groups.why_not_together` has nothing against.
        portable: the decode.
        launch: shape of the launch; None = the tuned one.
        overlap: start while the kernel before it ends, which must not write weights.
    """
    x = x.contiguous()
    (tokens, columns), first = x.shape, members[0]
    bits, group_size, scale_coding, levels, default_zero = first.layout
    sizes = tuple(member.packed.shape[0] for member in members)
    launch = launch or choose_launch(bits, tokens, sum(sizes))
    minus = 0.0 if first.zero is not None else default_zero
    values = tuple(levels) or tuple(code - minus for code in range(2**bits))
    table, codebook, words = _tables(values, x.dtype, x.device)
    packed = tuple(member.packed for member in members)
    scales = tuple(
        m.scale if m.nested is not None else view_bytes(m.scale, SCALE_DTYPES[scale_coding])
        for m in members
    )
    y = torch.empty((tokens, sum(sizes)), dtype=x.dtype, device=x.device)
    if not y.numel():
        return y
    token_blocks = triton.cdiv(tokens, launch.tokens)
    with torch.cuda.device_of(x):
        ax = _adapters_down(x, members, launch.tokens, overlap)
        blocks = sum(triton.cdiv(size, launch.rows) for size in sizes)
        _linear[(blocks, token_blocks)](
            x, packed if portable else tuple(t.view(torch.int32) for t in packed),
            packed if portable or bits != 3 else tuple(t.view(torch.int16) for t in packed),
            packed, scales, tuple(m.packed if m.zero is None else m.zero for m in members),
            tuple(table if m.nested is None else view_bytes(m.nested, torch.float32)
                  for m in members),
            table, codebook, words, x if ax is None else ax,
            tuple(x if m.lora_B is None else m.lora_B.contiguous() for m in members), y, sizes,
            tokens, sum(sizes), columns, scales[0].shape[-1], packed[0].shape[1],
            0 if first.zero is None else first.zero.shape[1], first.rank, 1,
            BITS=bits, GROUP=group_size, NESTED=first.nested is not None,
            ZEROS=first.zero is not None, ASM="" if portable else level_asm(bits),
            WIDTH=OPERAND_WIDTH, LORA=ax is not None, PARTS=PARTS, BATCH=launch.batch,
            ROWS=launch.rows, TOKENS=launch.tokens, AHEAD=launch.ahead, num_warps=launch.batch,
            **options(overlap),
        )  # fmt: skip
    return y


def _adapters_down(
    x: Tensor, members: Sequence[Member], tokens_of_program: int, overlap: bool
) -> Tensor | None:
    """scaling A x^T of every member in PARTS sums, (members, PARTS, tokens, rank); None without."""
    (tokens, columns), rank, stacked = x.shape, members[0].rank, members[0].stacked
    if not rank:
        return None
    ax = torch.empty((len(members), PARTS, tokens, rank), dtype=torch.float32, device=x.device)
    grid = (len(members) * triton.cdiv(rank, 16), PARTS, triton.cdiv(tokens, tokens_of_program))
    lora_As = tuple(m.lora_A.contiguous() for m in members if m.lora_A is not None)
    _down[grid](
        x, lora_As, ax, tuple(float(m.scaling) for m in members), tokens, columns, rank,
        tokens // stacked, rank // stacked, BATCH=8, TOKENS=tokens_of_program, PARTS=PARTS,
        num_warps=8, **options(overlap),
    )  # fmt: skip
    return ax


@lru_cache
def _tables(
    levels: tuple[float, ...], dtype: torch.dtype, device: torch.device
) -> tuple[Tensor, Tensor, Tensor]:
    """The nested coding's map, the levels in float32, and their bytes once for each lane q."""
    words = level_words(levels[:16], dtype).repeat_interleave(4)
    codebook = torch.tensor(levels, dtype=torch.float32)
    return dynamic_map().to(device), codebook.to(device), words.to(device)
