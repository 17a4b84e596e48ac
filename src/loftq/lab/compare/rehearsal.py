"""A comparison in a minute: one training step of each task, on a tiny model and made-up rows.

It shows that the recipe's options are understood, that the columns of its data sets are mapped, and
that its methods and formats train and are scored on the recipe's architecture. Its numbers mean
nothing.
"""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from loftq.lab.compare.cells import Cell, cells
from loftq.lab.compare.learner import TrainingLearner
from loftq.lab.compare.recipe import CompareRecipe
from loftq.lab.compare.standin import tiny
from loftq.lab.compare.standin_rows import words, write_rows

RANK, LENGTH = 4, 128
LITTLE: Mapping[str, Any] = {
    "max_steps": 1, "batch_size": 2, "gradient_accumulation": 1, "eval_rows": 4, "holdout": 0.5,
    "answer_tokens": 4, "samples": 0, "dtype": "fp32",
}  # fmt: skip
"""Options of a rehearsal, over those of a cell."""
TEXT = "calibration.txt"


@dataclass(frozen=True, kw_only=True)
class Step:
    """A cell that was rehearsed."""

    cell: str
    """Its name in the recipe."""
    metrics: Mapping[str, float]
    seconds: float

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready."""
        return asdict(self)


def rehearse(recipe: CompareRecipe, *, work: Path | None = None) -> list[Step]:
    """Train and score one step of enough cells to see every task and every line's method.

    Args:
        recipe: what to rehearse; needs an architecture.
        work: folder for it; None = a temporary one.

    Raises:
        ValueError: no architecture, or whatever goes wrong in a cell, which is named.
    """
    if not recipe.architecture:
        raise ValueError(f"{recipe.name}: has no architecture to make a tiny model of.")
    if work is None:
        with tempfile.TemporaryDirectory(prefix="loftq-rehearsal-") as place:
            return rehearse(recipe, work=Path(place))
    model = tiny(recipe.architecture, work / "model", words())
    data = write_rows(recipe.tasks, work / "data")
    (data / TEXT).write_text("\n".join(words()), encoding="utf-8")
    learner = TrainingLearner(str(model), device="cpu", data=data, headline=recipe.headline)
    return [_step(cell, learner, work) for cell in chosen(recipe)]


def chosen(recipe: CompareRecipe) -> list[Cell]:
    """Few cells that have every task, and every arm with every one of its formats, among them."""
    found = [cell for cell in cells(recipe) if cell.seed == 0]
    lines = list(dict.fromkeys((cell.arm.name, cell.format) for cell in found))
    tasks = list(recipe.tasks)
    longest = max(len(lines), len(tasks))
    wanted = [(tasks[i % len(tasks)], *lines[i % len(lines)]) for i in range(longest)]
    by_place: dict[Any, Cell] = {}
    for cell in found:
        by_place.setdefault((cell.task, cell.arm.name, cell.format), cell)
    return [by_place[place] for place in dict.fromkeys(wanted) if place in by_place]


def _step(cell: Cell, learner: TrainingLearner, work: Path) -> Step:
    small = _small(cell)
    backbone = None if small.backbone is None else work / "backbones" / small.backbone
    try:
        if backbone is not None and not backbone.exists():
            learner.quantize(small, backbone)
        learnt = learner.learn(small, work / "runs" / cell.name, backbone)
    except ValueError as error:
        raise ValueError(f"{cell.name}: {error}") from error
    seconds = sum(learnt.seconds.values())
    return Step(cell=cell.name, metrics=learnt.metrics, seconds=seconds)


def _small(cell: Cell) -> Cell:
    """The cell at a size that a tiny model takes a step of in a moment."""
    options = {k: v for k, v in cell.options.items() if k not in ("epochs", "train_rows")}
    length = min(LENGTH, options.get("max_length", LENGTH))
    options |= {**LITTLE, "max_length": length}
    if "formats" in options:  # patterns for blocks: those after the first find none here
        options["formats"] = dict(list(options["formats"].items())[:1])
    if "data" in options:
        options |= {"data": TEXT, "calibration_windows": 2, "calibration_context": 16}
    return replace(cell, rank=None if cell.rank is None else RANK, options=options)
