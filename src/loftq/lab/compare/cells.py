"""The cells of a comparison: one training run each."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from itertools import product
from typing import Any

from loftq.lab.compare.arms import QUANTIZATION, Arm, parse_arm
from loftq.lab.compare.recipe import CompareRecipe

ADAPTERS = ("alpha", "rslora", "targets", "skip")
"""Options of a quantization that mean something without one."""


SPEED = frozenset({"graphs"})
"""Options that change how fast a cell trains; of its result only the last bits."""


@dataclass(frozen=True, kw_only=True)
class Cell:
    """One run: a task, learnt from one start with one seed."""

    task: str
    arm: Arm
    format: str | None
    """By name or as bits; None = nothing is quantized."""
    rank: int | None
    """None = nothing is adapted."""
    seed: int
    options: Mapping[str, Any] = field(default_factory=dict)
    """Of `loftq train`, over the defaults of the task: recipe, rules, arm."""

    @property
    def line(self) -> tuple[str, str | None, int | None]:
        """What a line of the table stands for: arm, format, rank."""
        return self.arm.name, self.format, self.rank

    @property
    def name(self) -> str:
        """Unique in its comparison, fit for a file."""
        return "--".join((self.task, *self._stem(), f"s{self.seed}"))

    @property
    def backbone(self) -> str | None:
        """Name of the quantized model that it shares with other cells; None = the original.

        Seed and task have no part in it: runs with other seeds start from the same adapter.
        """
        if not self.arm.quantizes:
            return None
        digest = hashlib.sha256(json.dumps(self.quantization, sort_keys=True).encode())
        return "--".join((*self._stem(), digest.hexdigest()[:8]))

    @property
    def quantization(self) -> dict[str, Any]:
        """Options of `loftq quantize`."""
        chosen = {key: value for key, value in self.options.items() if key in QUANTIZATION}
        return {"method": self.arm.method, "rank": self.rank, **_width(self.format), **chosen}

    @property
    def adapters(self) -> dict[str, Any]:
        """Options of adapters on original weights."""
        named = {key: self.options[key] for key in ADAPTERS if key in self.options}
        return {} if self.rank is None else {"rank": self.rank, **named}

    @property
    def training(self) -> dict[str, Any]:
        """Options of `loftq train` that are none of a quantization, the seed among them."""
        chosen = {key: value for key, value in self.options.items() if key not in QUANTIZATION}
        return {**chosen, "seed": self.seed}

    @property
    def digest(self) -> str:
        """Identity of its settings: a kept row counts only for the same."""
        options = {key: value for key, value in self.options.items() if key not in SPEED}
        what = [self.task, self.arm.method, self.format, self.rank, self.seed, options]
        return hashlib.sha256(json.dumps(what, sort_keys=True).encode()).hexdigest()[:16]

    def _stem(self) -> tuple[str, ...]:
        rank = None if self.rank is None else f"r{self.rank}"
        parts = (re.sub(r"[^\w.+-]", "_", self.arm.name), self.format, rank)
        return tuple(part for part in parts if part is not None)


def cells(recipe: CompareRecipe) -> list[Cell]:
    """Every cell of a comparison, seed by seed, so that a table with one seed is there early.

    Raises:
        ValueError: an arm that does not exist.
    """
    found = {cell.name: cell for block in _blocks(recipe) for cell in _product(recipe, **block)}
    return sorted(found.values(), key=lambda cell: cell.seed)


def _blocks(recipe: CompareRecipe) -> Iterator[dict[str, Any]]:
    own: dict[str, Any] = {
        "tasks": list(recipe.tasks), "methods": recipe.methods, "formats": recipe.formats,
        "ranks": recipe.ranks, "seeds": recipe.seeds,
    }  # fmt: skip
    yield own
    for block in recipe.more:
        yield own | dict(block)


def _product(
    recipe: CompareRecipe, *, tasks: Any, methods: Any, formats: Any, ranks: Any, seeds: int
) -> Iterator[Cell]:
    arms = [parse_arm(word) for word in methods]
    for task, arm, format, rank, seed in product(
        tasks, arms, formats or (None,), ranks, range(seeds)
    ):
        axes: dict[str, Any] = {
            "task": task,
            "format": str(format) if arm.quantizes else None,
            "rank": rank if arm.adapts else None,
        }
        chosen = recipe.options_for({**axes, "method": arm.method}) | dict(arm.options)
        yield Cell(arm=arm, seed=seed, options=chosen, **axes)


def _width(format: str | None) -> dict[str, Any]:
    """`format` or `bits`, whichever the word is."""
    if format is None:
        return {}
    try:
        return {"bits": float(format)}
    except ValueError:
        return {"format": format}
