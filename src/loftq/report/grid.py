"""The errors of all layers on one sheet: blocks of the model down, kinds of layer across."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from loftq.report.inspect import LayerRow

OUTSIDE = "outside"
"""Row of the layers that are in no block."""
_NUMBER = re.compile(r"(?:^|\.)(\d+)(?=\.|$)")


@dataclass(frozen=True)
class ErrorGrid:
    """Mean relative errors by block (rows) and kind of layer (columns); None where there is none.

    Layers of one cell, such as the experts of a mixture, are averaged.
    """

    blocks: tuple[str, ...]
    kinds: tuple[str, ...]
    plain: tuple[tuple[float | None, ...], ...]
    """Of rounding alone."""
    adapted: tuple[tuple[float | None, ...], ...]
    """With the start adapter."""


def error_grid(rows: Iterable[LayerRow]) -> ErrorGrid:
    """Errors of the layers by block and kind, both in the order of the model."""
    cells: dict[tuple[str, str], list[LayerRow]] = {}
    for row in rows:
        cells.setdefault(place(row.module), []).append(row)
    blocks = tuple(dict.fromkeys(block for block, _ in cells))
    kinds = tuple(dict.fromkeys(kind for _, kind in cells))

    def mean(block: str, kind: str, number: str) -> float | None:
        found = [getattr(row, number) for row in cells.get((block, kind), ())]
        return sum(found) / len(found) if found else None

    plain, adapted = (
        tuple(tuple(mean(block, kind, number) for kind in kinds) for block in blocks)
        for number in ("plain_error", "error")
    )
    return ErrorGrid(_short_blocks(blocks), short_names(kinds), plain, adapted)


def place(module: str) -> tuple[str, str]:
    """(block, kind) of a module: `model.layers.3.mlp.up_proj` is `mlp.up_proj` of block 3.

    The first number in the path counts the blocks; later ones become a star. The block keeps its
    stack ("encoder.layers 3"), which `error_grid` leaves out where there is only one.
    """
    found = _NUMBER.search(module)
    if found is None:
        return OUTSIDE, module
    stack, kind = module[: found.start()], module[found.end() + 1 :]
    return f"{stack} {found[1]}".strip(), _NUMBER.sub(".*", kind).lstrip(".") or stack


def short_names(names: Sequence[str]) -> tuple[str, ...]:
    """Each dotted name cut to the shortest end that no other of the names has."""
    return tuple(_shortest(name, [other for other in names if other != name]) for name in names)


def _shortest(name: str, others: Sequence[str]) -> str:
    parts = name.split(".")
    for length in range(1, len(parts)):
        end = ".".join(parts[-length:])
        if not any(other == end or other.endswith(f".{end}") for other in others):
            return end
    return name


def _short_blocks(blocks: tuple[str, ...]) -> tuple[str, ...]:
    stacks = dict.fromkeys(block.rpartition(" ")[0] for block in blocks if block != OUTSIDE)
    names = dict.fromkeys(stacks, "") if len(stacks) < 2 else _stack_names(tuple(stacks))
    shown = []
    for block in blocks:
        stack, _, number = block.rpartition(" ")
        shown.append(block if block == OUTSIDE else f"{names[stack]} {number}".strip())
    return tuple(shown)


def _stack_names(stacks: tuple[str, ...]) -> dict[str, str]:
    """encoder.block and decoder.block are told apart by the first part in which they differ."""
    parts = [stack.split(".") for stack in stacks]
    for position in range(min(map(len, parts))):
        names = [part[position] for part in parts]
        if len(set(names)) == len(names):
            return dict(zip(stacks, names, strict=True))
    return {stack: stack for stack in stacks}
