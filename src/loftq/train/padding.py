"""Rows of different lengths as one tensor."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

IGNORED = -100
"""Label of a position that is not learnt."""


def pad(rows: Sequence[Sequence[int]], value: int, *, left: bool = False) -> Tensor:
    """(rows, longest) int64, filled up with `value`."""
    width = max(map(len, rows))
    found = torch.full((len(rows), width), value, dtype=torch.int64)
    for i, row in enumerate(rows):
        at = slice(width - len(row), width) if left else slice(0, len(row))
        found[i, at] = torch.tensor(row, dtype=torch.int64)
    return found
