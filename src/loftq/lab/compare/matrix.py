"""Carry a comparison out: cell by cell, resumable, several processes on one folder if wanted.

    OUT/  compare.json   rows/CELL.json   runs/CELL/ (as `loftq train` leaves it)
          backbones/NAME/ (as `loftq quantize` leaves it)   table.md   table.json   picture.svg

A cell belongs to the process that holds its lock, and is done when its row is there. Whatever
interrupts a process, the same command goes on: rows are kept, a half-trained cell continues from
its last checkpoint, a half-quantized backbone from its last batch.
"""

from __future__ import annotations

import json
import shutil
import time
import traceback
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Protocol

from loftq.checkpoint.durable import publish, write_partial
from loftq.lab.compare.cells import Cell, cells
from loftq.lab.compare.machine import describe_machine
from loftq.lab.compare.recipe import CompareRecipe
from loftq.lab.compare.store import DIVERGED, DONE, FAILED, Bytes, Row, RowStore
from loftq.lab.compare.table import Comparison, compare, markdown
from loftq.lab.locks import LOCKS, PATIENCE, Locks
from loftq.train.base import is_made
from loftq.train.errors import Diverged


@dataclass(frozen=True, kw_only=True)
class Learnt:
    """What training and evaluating a cell gave."""

    metrics: Mapping[str, float]
    primary: str
    greater_is_better: bool
    interval: tuple[float, float] | None
    """Of the primary metric, for other rows of the same kind."""
    bits_per_weight: float
    bytes: Bytes
    seconds: Mapping[str, float]
    steps: int
    examples: int


class Learner(Protocol):
    """Trains cells; the matrix itself knows nothing of models."""

    @property
    def device(self) -> str:
        """As rows report it: cpu, cuda."""

    def quantize(self, cell: Cell, backbone: Path) -> None:
        """Make the quantized model of a cell, or finish one that was begun."""

    def learn(self, cell: Cell, run: Path, backbone: Path | None) -> Learnt:
        """Train and evaluate a cell.

        Args:
            cell: what to train.
            run: folder for it; a run that was interrupted may be there.
            backbone: its quantized model, None = the original.

        Raises:
            Diverged: a loss that is no number.
        """


@dataclass(kw_only=True)
class Watcher:
    """Told how a comparison goes; does nothing by itself."""

    begun: Callable[[Cell, int, int], object] = field(default=lambda cell, place, total: None)
    """A cell begins: which, its place (from 1), how many there are."""
    ended: Callable[[Row], object] = field(default=lambda row: None)
    """A row is there, made now."""


def run_comparison(
    recipe: CompareRecipe,
    output: Path,
    learner: Learner,
    *,
    retry: bool = False,
    against: str | None = None,
    watcher: Watcher | None = None,
) -> Comparison:
    """Train every cell that has no row yet and write table and picture.

    Args:
        recipe: what to compare.
        output: folder; one that an earlier call left is continued.
        learner: trains a cell.
        retry: train again what failed or diverged before.
        against: arm that the others are compared with (`table.compare`).
        watcher: told of every cell.

    Returns:
        The comparison with all rows there are. Cells that another process is working on are
        missing; it writes the table again when it is done.

    Raises:
        ValueError: another comparison in `output`, a row made with other settings, an unknown arm.
    """
    watcher = watcher or Watcher()
    planned = cells(recipe)
    compare(recipe, (), against=against)  # an arm that does not exist is found before any work
    folders = Folders(output)
    _claim(recipe, folders)
    found = {cell.name: folders.store.find(cell) for cell in planned}  # other settings: refused now
    for place, cell in enumerate(planned, 1):
        row = found[cell.name]
        if row is not None and (row.status == DONE or not retry):
            _tidy(folders.run(cell))  # a kill may have come between the row and this
            continue
        with folders.locks.free(cell.name) as ours:
            row = folders.store.find(cell)
            if not ours or (row is not None and (row.status == DONE or not retry)):
                continue  # another process has it, or has made it meanwhile
            watcher.begun(cell, place, len(planned))
            row = _row(cell, folders, learner)
            folders.store.put(row)
            _tidy(folders.run(cell))
        watcher.ended(row)
    return write_tables(recipe, output, against=against)


def write_tables(recipe: CompareRecipe, output: Path, *, against: str | None = None) -> Comparison:
    """table.md, table.json and, where matplotlib is, picture.svg from the rows that are there."""
    folders = Folders(output)
    with folders.locks.waiting("tables"):
        rows = [row for cell in cells(recipe) if (row := folders.store.find(cell))]
        found = compare(recipe, rows, against=against)
        picture = _picture(found, output / "picture.svg")
        _write(output / "table.md", markdown(found, picture=picture))
        text = json.dumps(found.to_dict(), indent=1, ensure_ascii=False, allow_nan=False)
        _write(output / "table.json", text + "\n")
    return found


@dataclass(frozen=True)
class Folders:
    """Where things are in the folder of a comparison."""

    output: Path

    @property
    def store(self) -> RowStore:
        """The rows."""
        return RowStore(self.output / "rows")

    def run(self, cell: Cell) -> Path:
        """Of a cell's training."""
        return self.output / "runs" / cell.name

    def backbone(self, cell: Cell) -> Path | None:
        """Of a cell's quantized model."""
        return None if cell.backbone is None else self.output / "backbones" / cell.backbone

    @property
    def locks(self) -> Locks:
        """Of its cells, its backbones and its tables."""
        return Locks(self.output)


def _row(cell: Cell, folders: Folders, learner: Learner) -> Row:
    """Train a cell; whatever goes wrong becomes its row, and the others go on."""
    row = Row(
        cell=cell.name,
        digest=cell.digest,
        task=cell.task,
        method=cell.arm.name,
        format=cell.format,
        rank=cell.rank,
        seed=cell.seed,
        status=FAILED,
        options=dict(cell.options),
        machine=describe_machine(learner.device),
    )
    try:
        backbone = folders.backbone(cell)
        if backbone is not None:
            _settle(cell, backbone, folders, learner)
        learnt = learner.learn(cell, folders.run(cell), backbone)
    except Diverged as error:
        return replace(row, status=DIVERGED, error=str(error))
    except Exception as error:  # a cell may fail in any way there is; its row says how
        trace = "".join(traceback.format_exception(error))
        return replace(row, error=f"{type(error).__name__}: {error}\n\n{trace}")
    return replace(row, status=DONE, **vars(learnt))


def _settle(cell: Cell, backbone: Path, folders: Folders, learner: Learner) -> None:
    """Have the backbone made, by this process or by the one that is making it."""
    while not is_made(backbone):
        with folders.locks.free(backbone.name) as ours:
            if ours and not is_made(backbone):
                learner.quantize(cell, backbone)
        time.sleep(0 if ours else PATIENCE)


def _claim(recipe: CompareRecipe, folders: Folders) -> None:
    """Make the folder this comparison's own."""
    output, mine = folders.output, {"recipe": recipe.name, "model": recipe.model}
    file = output / "compare.json"
    if not file.is_file() and output.exists() and any(p.name != LOCKS for p in output.iterdir()):
        raise ValueError(
            f"{output}: holds files and no comparison, so it will not be written to. Choose "
            "another folder with -o."
        )
    with folders.locks.waiting("compare"):
        if not file.is_file():
            _write(file, json.dumps(mine, indent=1) + "\n")
    try:
        theirs = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{file}: cannot be read ({error}). Choose another folder.") from error
    if theirs != mine:
        raise ValueError(
            f"{output}: holds the comparison {theirs.get('recipe')} of {theirs.get('model')}, and "
            f"this is {recipe.name} of {recipe.model}. Choose another folder with -o."
        )


def _picture(found: Comparison, path: Path) -> str | None:
    """Draw it; None where there is nothing to draw with or nothing to draw."""
    from importlib.util import find_spec

    if find_spec("matplotlib") is None or not any(row.status == DONE for row in found.rows):
        return None
    from loftq.lab.compare.picture import draw

    return draw(found, path).name


def _tidy(run: Path) -> None:
    """Checkpoints of a run that has its row are of no more use."""
    shutil.rmtree(run / "checkpoints", ignore_errors=True)


def _write(path: Path, text: str) -> None:
    write_partial(path, text.encode())
    publish(path)
