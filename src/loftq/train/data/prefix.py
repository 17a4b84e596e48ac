"""How far two sequences agree."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any


def shared_length(a: Sequence[Any], b: Sequence[Any]) -> int:
    """Length of the longest common beginning: 2 for "abc" and "abd"."""
    shorter = min(len(a), len(b))
    return next((n for n in range(shorter) if a[n] != b[n]), shorter)
