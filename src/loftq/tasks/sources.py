"""The rows of a task: from local files of the published names, or from the hub."""

from __future__ import annotations

import gzip
import os
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from loftq.tasks.base import Task, TaskError, TaskRow
from loftq.train.data.files import READERS, Row, Rows, as_row, kind_of, known_kinds, read_file
from loftq.train.data.problems import BadRow, BadRows, DataError, Place, rows_of

VARIABLE = "LOFTQ_DATA"
MOST_HELD = 1000
"""Most rows that are held out of train to choose a checkpoint by."""
RAW = ".raw"
"""Suffix of WikiText's files."""
ORDER = 0
"""Seed of what is held out and of the first rows: the same for every run, so that runs compare."""


@dataclass(frozen=True, kw_only=True)
class TaskData:
    """The rows of a task for training."""

    train: list[TaskRow]
    validation: list[TaskRow]
    """By which the checkpoint is chosen; never what is reported."""
    source: str
    """Folder or hub id."""
    skipped: int = 0
    """Rows left out because they cannot be used."""
    notes: tuple[str, ...] = ()


def read_split(
    task: Task, name: str, *, data: str | Path | None = None, skip: list[BadRow] | None = None
) -> list[TaskRow]:
    """One published split, every row checked.

    Args:
        task: whose.
        name: of the split, as in `task.splits`.
        data: folder laid out as LOFTQ_DATA; None = LOFTQ_DATA if it is set, else the hub.
        skip: takes the rows that cannot be used; None = they are an error.

    Raises:
        TaskError: no such split, a missing column, a value out of range: the first rows by place.
    """
    if task.splits.first is not None:
        return _part_of_one_file(task, name, data, skip)
    return task.arrange(_checked(task, name, data, _rows(task, name, data), skip))


def read_for_training(
    task: Task,
    *,
    data: str | Path | None = None,
    rows: int | None = None,
    holdout: float = 0.05,
    validation_rows: int | None = None,
    on_bad_rows: str = "error",
) -> TaskData:
    """Rows to train on and rows to choose a checkpoint by.

    Args:
        task: whose.
        data: as in `read_split`.
        rows: train on the first so many of a fixed shuffle; None = all.
        holdout: share of train that is held out where the task has no validation split (1000 rows
            at most), by whole values of `splits.by` where the task names one.
        validation_rows: choose by the first so many of a fixed shuffle; None = all.
        on_bad_rows: error, or skip, which leaves them out.

    Raises:
        TaskError: as `read_split`, or too few rows.
    """
    skipped: list[BadRow] | None = [] if on_bad_rows == "skip" else None

    def read(names: Sequence[str]) -> list[TaskRow]:
        return [row for n in names for row in read_split(task, n, data=data, skip=skipped)]

    train = read(task.splits.train)
    if task.splits.validation:
        names = task.splits.validation
        held = some(read(names), validation_rows)
        note = f"the checkpoint is chosen on {len(held)} rows of the split {', '.join(names)}"
    else:
        train, held = _hold_out(task, train, holdout)
        held = some(held, validation_rows)
        note = f"the checkpoint is chosen on {len(held)} rows held out of train"
    train = some(train, rows)
    if not train or not held:
        raise TaskError(f"{task.name}: {len(train)} rows to train on, {len(held)} held out.")
    notes = [note]
    if skipped:
        left_out = f"{rows_of(len(skipped))} cannot be used, left out of training"
        notes.append(f"{left_out}, such as {skipped[0]}")
    return TaskData(
        train=train,
        validation=held,
        source=_named(task, data),
        skipped=len(skipped or ()),
        notes=tuple(notes),
    )


def some(rows: Sequence[TaskRow], count: int | None) -> list[TaskRow]:
    """The first `count` of a fixed shuffle, in the order of the data; None = all."""
    if count is None or count >= len(rows):
        return list(rows)
    order = list(range(len(rows)))
    random.Random(ORDER).shuffle(order)
    return [rows[i] for i in sorted(order[:count])]


def _hold_out(
    task: Task, rows: list[TaskRow], holdout: float
) -> tuple[list[TaskRow], list[TaskRow]]:
    wanted = min(MOST_HELD, max(1, round(holdout * len(rows))))
    by = task.splits.by
    if by is None:
        order = list(range(len(rows)))
        random.Random(ORDER).shuffle(order)
        held = set(order[:wanted])
        kept = [row for i, row in enumerate(rows) if i not in held]
        return kept, [rows[i] for i in sorted(held)]
    groups = list(dict.fromkeys(row.values[by] for row in rows))
    random.Random(ORDER).shuffle(groups)
    chosen: set[Any] = set()
    for group in groups:
        if sum(row.values[by] in chosen for row in rows) >= wanted:
            break
        chosen.add(group)
    kept = [row for row in rows if row.values[by] not in chosen]
    return kept, [row for row in rows if row.values[by] in chosen]


def _part_of_one_file(
    task: Task, name: str, data: str | Path | None, skip: list[BadRow] | None
) -> list[TaskRow]:
    """A split of a data set that is one file: by the values of a column, in file order."""
    by, first = task.splits.by, task.splits.first
    assert by is not None, "a file is split by a column"
    assert first is not None, "at one of its values"
    if name not in (*task.splits.train, *task.splits.test):
        raise _no_split(task, name, (*task.splits.train, *task.splits.test))
    rows = _checked(task, name, data, _rows(task, None, data), skip)
    groups = list(dict.fromkeys(row.values[by] for row in rows))
    if len(groups) <= first:
        raise TaskError(
            f"{task.name}: {len(groups)} values of {by!r}; the first {first} are for training, and "
            "none is left to test on. Check that the file is complete."
        )
    chosen = set(groups[:first] if name in task.splits.train else groups[first:])
    return [row for row in rows if row.values[by] in chosen]


def _checked(
    task: Task, name: str, data: str | Path | None, rows: Rows, skip: list[BadRow] | None
) -> list[TaskRow]:
    found, bad = [], BadRows()
    try:
        for row in rows:
            reason = row if isinstance(row, BadRow) else _problem(task, row)
            if isinstance(row, Row) and reason is None:
                found.append(TaskRow(values=row.values, place=str(row.place)))
            elif isinstance(reason, BadRow):
                (bad.add if skip is None else skip.append)(reason)
    except DataError as error:
        raise TaskError(f"{task.name}: {error}") from error
    if bad.count:
        found_bad = f"{task.name}, split {name}: {rows_of(bad.count)} cannot be used:"
        shown = "\n".join([found_bad, *bad.lines()])
        remedy = "Repair the data, or train without them: on_bad_rows=skip."
        if name in task.splits.test:
            remedy = "Repair the data: a split that is reported is never thinned."
        raise TaskError(f"{shown}\n{remedy}")
    if not found:
        raise TaskError(f"{task.name}: the split {name} of {_named(task, data)} holds no rows.")
    return found


def _problem(task: Task, row: Row) -> BadRow | None:
    missing = [name for name in task.columns if name not in row.values]
    if missing:
        there = ", ".join(row.values) or "none"
        return BadRow(row.place, f"no column {', '.join(map(repr, missing))}; found {there}.")
    reason = task.problem(row.values)
    return BadRow(row.place, reason) if reason else None


def _rows(task: Task, name: str | None, data: str | Path | None) -> Rows:
    root = _root(data)
    if root is None:
        return _hub_rows(task, name)
    path = _file(task, root, name)
    return _raw_lines(path) if kind_of(path) == RAW else read_file(path)


def _root(data: str | Path | None) -> Path | None:
    given = data if data is not None else os.environ.get(VARIABLE)
    if not given:
        return None
    root = Path(given).expanduser()
    if not root.is_dir():
        where = "data" if data is not None else VARIABLE
        raise TaskError(f"{where}={given}: no such folder. Give the folder that holds the tasks'.")
    return root


def _file(task: Task, root: Path, name: str | None) -> Path:
    """The file of a split, whatever kind of file it is."""
    folder = root / task.local
    stem = folder if name is None else folder / task.files.get(name, name)
    near = sorted(stem.parent.iterdir()) if stem.parent.is_dir() else []
    readable = {path: _stem(path) for path in near if kind_of(path) in (*READERS, RAW)}
    found = next((path for path, known in readable.items() if known == stem.name), None)
    if found is not None:
        return found
    if name is not None and stem.parent.is_dir():
        raise _no_split(task, name, sorted(set(readable.values())), where=stem.parent)
    remedy = f"Put the files of {task.hub} there, or unset {VARIABLE} to take them from the hub."
    if task.hub is None:
        remedy = "Put its files there: it is read from local files only."
    raise TaskError(f"{task.name}: {stem} is not there ({known_kinds()}). {remedy}")


def _stem(path: Path) -> str:
    """The name without the suffixes that say how a file is read."""
    bare = path.with_suffix("") if path.suffix == ".gz" else path
    return bare.stem


def _raw_lines(path: Path) -> Rows:
    """A WikiText raw file: a row for each line with its end, an empty one where it is blank."""
    raw = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    try:
        lines = raw.decode("utf-8").split("\n")[:-1]
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: not UTF-8 ({error}). Convert the file to UTF-8.") from error
    for number, line in enumerate(lines, 1):
        text = f"{line}\n" if line.strip() else ""
        yield as_row(Place(str(path), number, "line"), {"text": text})


def _hub_rows(task: Task, name: str | None) -> Iterator[Row | BadRow]:
    from loftq.train.data.sources import load_splits

    if task.hub is None:
        raise TaskError(
            f"{task.name}: its data is read from local files only. Set {VARIABLE} to the folder "
            f"that holds {task.local}."
        )
    repository, _, configuration = task.hub.partition(":")
    try:
        splits = load_splits(task.hub, repository, configuration or None)
    except DataError as error:
        raise TaskError(
            f"{task.name}: {error} With local files, set {VARIABLE} to their folder."
        ) from error
    if name not in splits:
        raise _no_split(task, str(name), list(splits), where=task.hub)
    for number, values in enumerate(splits[name], 1):
        yield as_row(Place(f"{task.hub} ({name})", number), values)


def _no_split(task: Task, name: str, there: Sequence[str], *, where: Any = None) -> TaskError:
    place = f" in {where}" if where else ""
    found = ", ".join(there) or "none"
    return TaskError(f"{task.name}: no split {name!r}{place}; found {found}.")


def _named(task: Task, data: str | Path | None) -> str:
    root = _root(data)
    return str(task.hub) if root is None else str(root / task.local)
