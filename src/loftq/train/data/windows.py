"""A long text in pieces that fit, cut where a reader would pause."""

from __future__ import annotations

import re
from bisect import bisect_right
from collections.abc import Sequence

PAUSES = (re.compile(r"\n[ \t]*\n\s*"), re.compile(r"\n"))
"""Ends of paragraphs, then of lines."""


def windows(text: str, ends: Sequence[int], size: int) -> list[tuple[int, int]]:
    """Ranges of tokens, consecutive and complete, of at most `size` tokens each.

    A piece ends with the last paragraph that ends in its second half, else the last such line,
    else where it is full: "a b\\n\\nc d" in pieces of 3 words is [a b][c d], not [a b c][d].

    Args:
        text: the text.
        ends: for each token the character after its last, not decreasing.
        size: tokens of a piece, at least 1.
    """
    if size < 1:
        raise ValueError(f"size={size}: a piece holds at least 1 token.")
    if len(ends) <= size:
        return [(0, len(ends))] if ends else []
    pauses = [_tokens_at(text, ends, pattern) for pattern in PAUSES]
    found, start = [], 0
    while len(ends) - start > size:
        stop = _stop(pauses, start, start + size)
        found.append((start, stop))
        start = stop
    return [*found, (start, len(ends))]


def _tokens_at(text: str, ends: Sequence[int], pattern: re.Pattern[str]) -> list[int]:
    """Indices of the tokens that begin after a pause, increasing."""
    return [bisect_right(ends, match.end()) for match in pattern.finditer(text)]


def _stop(pauses: Sequence[list[int]], start: int, full: int) -> int:
    for places in pauses:
        last = bisect_right(places, full) - 1
        if last >= 0 and places[last] > (start + full) // 2:
            return places[last]
    return full
