"""PTX that turns packed codes into 16-bit levels: byte permutes instead of a table in memory.

A unit is the codes of one machine word of a row: 8 codes of 4 bits, or 16 codes of 2 bits, or 16
of 3 bits (a word of the 2-bit plane with a half word of the 1-bit plane). PRMT picks four of eight
bytes by the nibbles of a selector. With the high and the low bytes of the levels in registers a
code is such a nibble, and four codes cost a permute for the high bytes, one for the low bytes
(twice that and a select by the fourth bit where there are 16 levels) and two that pair the bytes
up. In all, per weight: 2.6 operations at 4 bits, 1.7 at 3 and 1.4 at 2.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import torch
from torch import Tensor

UNIT = {4: 8, 3: 16, 2: 16}
"""Bits -> codes in a unit."""


def level_words(levels: Sequence[float], dtype: torch.dtype) -> Tensor:
    """Levels rounded to a 16-bit `dtype`, bytes apart: int32 (8,), four words of high bytes, then
    four of low bytes, lowest code first. Unused places are zero."""
    rounded = torch.zeros(16, dtype=dtype)
    rounded[: len(levels)] = torch.tensor(levels, dtype=torch.float32).to(dtype)
    low_high = rounded.view(torch.uint8).view(16, 2).T.contiguous().view(torch.int32)
    return low_high.flip(0).flatten()


@lru_cache
def level_asm(bits: int) -> str:
    """PTX from a unit and the words of its table to one 16-bit register a code, in order.

    Operands: the outputs, the word, for 3 bits the half word, then `level_words` (all eight for 4
    bits, else words 0, 1, 4, 5: eight levels need no more).
    """
    word, table = f"${UNIT[bits]}", UNIT[bits] + (2 if bits == 3 else 1)
    size = 4 if bits == 4 else 2
    high, low = ([f"${table + half * size + i}" for i in range(size)] for half in (0, 1))
    words = (high, low)
    lines = [".reg .b32 a, b, c, d, e, h, l, m, p, s;"]
    lines += _nibbles(word, words) if bits == 4 else _planes(bits, word, words)
    return "{\n" + "\n".join(lines) + "\n}"


def _nibbles(word: str, words: tuple[list[str], list[str]]) -> list[str]:
    """Nibbles are selectors; their top bits, spread over bytes, choose the half of the table."""
    lines = [f"shl.b32 d, {word}, 4;", f"and.b32 s, {word}, 0x77777777;"]
    for part, spread in enumerate((0xD9C8, 0xFBEA)):
        lines += ["shr.u32 s, s, 16;"] * part
        lines.append(f"prmt.b32 m, d, {word}, {spread:#x};")
        for half, (t0, t1, t2, t3) in zip("hl", words, strict=True):
            lines += [
                f"prmt.b32 a, {t0}, {t1}, s;",
                f"prmt.b32 b, {t2}, {t3}, s;",
                f"lop3.b32 {half}, a, b, m, 0xD8;",  # m ? b : a, bit by bit
            ]
        lines += _pair(4 * part, (0x5140, 0x7362))
    return lines


def _planes(bits: int, word: str, words: tuple[list[str], list[str]]) -> list[str]:
    """c: the even codes as nibbles, d: the odd ones; a third bit comes through a table of bytes."""
    lines = [f"and.b32 c, {word}, 0x33333333;"]
    lines += [f"shr.u32 d, {word}, 2;", "and.b32 d, d, 0x33333333;"]
    if bits == 3:  # of four third bits, 0 and 2 go to bits 2 and 6 of a byte, then 1 and 3
        lines.append(f"cvt.u32.u16 e, ${UNIT[3] + 1};")
        for target in "cd":
            lines += ["and.b32 a, e, 0x7777;", "prmt.b32 a, 0x04000400, 0x44404440, a;"]
            lines += [f"or.b32 {target}, {target}, a;", "shr.u32 e, e, 1;"]
    (h0, h1), (l0, l1) = words
    for first, mix in ((0, 0x5140), (8, 0x7362)):  # codes 0 2 1 3 | 4 6 5 7, then 8 10 9 11 | ...
        lines.append(f"prmt.b32 s, c, d, {mix:#06x};")
        for part in (0, 4):
            lines += ["shr.u32 s, s, 16;"] * (part // 4)
            lines += [f"prmt.b32 h, {h0}, {h1}, s;", f"prmt.b32 l, {l0}, {l1}, s;"]
            lines += _pair(first + part, (0x6240, 0x7351))
    return lines


def _pair(first: int, picks: tuple[int, int]) -> list[str]:
    """Low bytes l and high bytes h of four codes into outputs first .. first + 3."""
    lines = []
    for at, pick in zip((first, first + 2), picks, strict=True):
        lines += [f"prmt.b32 p, l, h, {pick:#06x};", f"mov.b32 {{${at}, ${at + 1}}}, p;"]
    return lines
