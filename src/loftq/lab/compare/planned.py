"""What a comparison would take, before anything is trained: cells, bytes, memory, problems."""

from __future__ import annotations

import tempfile
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from loftq.lab.compare.cells import Cell, cells
from loftq.lab.compare.recipe import CompareRecipe
from loftq.lab.compare.sizes import base_bytes, bits_per_weight, held_bytes, plan_cell
from loftq.lab.compare.standin import full_size
from loftq.lab.compare.statistics import Line
from loftq.lab.compare.store import Bytes
from loftq.pipeline.plan import Plan

NO_PEAK = "peaks are predicted for packed causal language models only"
HEADERS_ONLY = "headers made from the recipe's architecture: nothing was downloaded"


@dataclass(frozen=True, kw_only=True)
class PlannedLine:
    """One line of the table to come."""

    line: Line
    cells: int
    bits_per_weight: float | None
    bytes: Bytes | None
    """None where the plan has a problem."""
    training_held: int | None
    """Bytes that lie there throughout a training, without activations (`sizes.held_bytes`)."""
    training_peak: int | None
    """Predicted bytes on a GPU while its largest task trains; None where that cannot be said."""
    note: str
    """Why there is no peak."""
    problem: str


@dataclass(frozen=True, kw_only=True)
class PlannedComparison:
    """A dry run's answer."""

    recipe: str
    model: str
    headers: str
    """Where the shapes come from."""
    cells: int
    tasks: Mapping[str, int]
    """Cells of each."""
    lines: tuple[PlannedLine, ...]

    @property
    def problems(self) -> list[str]:
        """Of all lines."""
        return [found.problem for found in self.lines if found.problem]

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready."""
        return asdict(self)


def plan_comparison(recipe: CompareRecipe) -> PlannedComparison:
    """Plan every line of a comparison; reads headers only, and of a model elsewhere nothing.

    Args:
        recipe: what to compare.

    Raises:
        ValueError: an arm or a task that does not exist, or a model that is neither here nor
            described by the recipe.
    """
    planned = cells(recipe)
    lines = dict.fromkeys(cell.line for cell in planned)
    with _headers(recipe) as (folder, origin):
        found = tuple(
            _plan_line([cell for cell in planned if cell.line == line], folder) for line in lines
        )
    return PlannedComparison(
        recipe=recipe.name,
        model=recipe.model,
        headers=origin,
        cells=len(planned),
        tasks=Counter(cell.task for cell in planned),
        lines=found,
    )


@contextmanager
def _headers(recipe: CompareRecipe) -> Iterator[tuple[Path, str]]:
    """A folder whose headers are those of the model, and where they come from."""
    local = Path(recipe.model)
    if local.is_dir():
        yield local, str(local)
        return
    if not recipe.architecture:
        raise ValueError(
            f"{recipe.name}: {recipe.model} is not a folder, and the recipe has no architecture to "
            "plan by. Give the model's folder with --model."
        )
    with tempfile.TemporaryDirectory(prefix="loftq-plan-") as place:
        yield full_size(recipe.architecture, Path(place)), HEADERS_ONLY


def _plan_line(found: list[Cell], folder: Path) -> PlannedLine:
    first, peak, note = found[0], None, ""
    try:
        plan = plan_cell(first, folder)
    except ValueError as error:
        problem = f"{first.arm.name}, {first.format}, rank {first.rank}: {error}"
        return PlannedLine(
            line=first.line, cells=len(found), bits_per_weight=None, bytes=None,
            training_held=None, training_peak=None, note="", problem=problem,
        )  # fmt: skip
    if first.arm.quantizes:
        peak, note = _peak(plan, folder, found)
    else:
        note = NO_PEAK
    stored = base_bytes(first, plan)
    return PlannedLine(
        line=first.line,
        cells=len(found),
        bits_per_weight=bits_per_weight(first, plan),
        bytes=stored,
        training_held=held_bytes(first, stored),
        training_peak=peak,
        note=note,
        problem="",
    )


def _peak(plan: Plan, folder: Path, found: list[Cell]) -> tuple[int | None, str]:
    """The largest predicted peak of a line's tasks, on a GPU in bf16."""
    from loftq.train.memory import TrainingSettings, UnknownModel, predict, subject_of_plan

    try:
        subject = subject_of_plan(plan, folder)
        return max(
            predict(subject, TrainingSettings(**settings)).total
            for settings in map(_memory_settings, found)
        ), ""
    except UnknownModel:
        return None, NO_PEAK


def _memory_settings(cell: Cell) -> dict[str, Any]:
    same = ("batch_size", "checkpointing", "keep_blocks", "fused", "optimizer")
    names = {"max_length": "length", "gradient_accumulation": "accumulation"}
    names |= {name: name for name in same}
    return {theirs: cell.options[own] for own, theirs in names.items() if own in cell.options}
