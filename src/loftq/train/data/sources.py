"""Where rows come from: a file, a folder of files, or a data set of the hub."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from loftq.train.data.files import READERS, Rows, as_row, kind_of, known_kinds, read_file
from loftq.train.data.problems import DataError, Place

HUB_ID = re.compile(r"\w[\w.-]*(/\w[\w.-]*)?(:[\w.-]+)?")
"""ORG/NAME, and the configuration after a colon where a data set has several."""
_SPLITS = {
    "train": "train",
    "training": "train",
    "validation": "validation",
    "valid": "validation",
    "val": "validation",
    "dev": "validation",
    "test": "test",
}


@dataclass(frozen=True)
class Source:
    """What a name leads to; nothing has been read yet."""

    train: Callable[[], Rows]
    validation: Callable[[], Rows] | None = None
    """Its own validation split."""
    notes: tuple[str, ...] = ()
    """What was left out or decided."""

    @property
    def for_validation(self) -> Callable[[], Rows]:
        """What to validate on when this is named as validation data."""
        return self.validation or self.train


def open_source(name: str) -> Source:
    """The rows behind a path or hub id.

    Raises:
        DataError: neither a file, a folder, nor a data set that can be had.
    """
    path = Path(name).expanduser()
    if path.is_dir():
        return _folder(path)
    if path.exists():
        if kind_of(path) not in READERS:
            suffix = path.suffix or "no"
            raise DataError(f"{path}: {suffix} suffix; expected one of {known_kinds()}.")
        return Source(lambda: read_file(path))
    if kind_of(path) in READERS or not HUB_ID.fullmatch(name):
        raise DataError(f"{name}: no such file or folder. Check the path.")
    return _hub(name)


def split_of(name: str) -> str:
    """train, validation or test when a whole word of the name says so, else train."""
    words = re.split(r"[^a-z]+", name.lower())
    return next((_SPLITS[word] for word in words if word in _SPLITS), "train")


def _folder(folder: Path) -> Source:
    files = [p for p in sorted(folder.iterdir()) if p.is_file() and kind_of(p) in READERS]
    if not files:
        raise DataError(f"{folder}: holds no data files; expected {known_kinds()}.")
    by_split: dict[str, list[Path]] = {"train": [], "validation": [], "test": []}
    for path in files:
        by_split[split_of(path.name)].append(path)
    train, validation, test = by_split["train"], by_split["validation"], by_split["test"]
    if not train:
        names = ", ".join(path.name for path in files)
        raise DataError(f"{folder}: {names}: none of them is training data by its name.")
    notes = [f"{folder}: trains on {', '.join(path.name for path in train)}"]
    if test:
        notes.append(f"left out as test data: {', '.join(path.name for path in test)}")
    held = (lambda: _all(validation)) if validation else None
    return Source(lambda: _all(train), held, tuple(notes))


def _all(files: list[Path]) -> Rows:
    for path in files:
        yield from read_file(path)


def _hub(name: str) -> Source:
    repository, _, configuration = name.partition(":")
    splits = load_splits(name, repository, configuration or None)
    if "train" not in splits:
        raise DataError(f"{name}: has no split train, only {', '.join(splits)}.")
    validation = next((s for s in splits if s != "train" and split_of(s) == "validation"), None)
    used = ("train", validation)
    left_out = [split for split in splits if split not in used]
    notes = [f"left out of {name}: split {', '.join(left_out)}"] if left_out else []
    return Source(
        lambda: _split(name, "train", splits["train"]),
        None if validation is None else (lambda: _split(name, validation, splits[validation])),
        tuple(notes),
    )


def _split(name: str, split: str, rows: Any) -> Rows:
    found: Iterator[Any] = iter(rows)
    for number, values in enumerate(found, 1):
        yield as_row(Place(f"{name} ({split})", number), values)


def load_splits(name: str, repository: str, configuration: str | None) -> Any:
    """All splits of a data set, from the cache or the hub."""
    from datasets import load_dataset

    try:
        return load_dataset(repository, configuration)
    except (OSError, ValueError, RuntimeError) as error:
        # Offline and not found, several configurations, a data set that is a script.
        reason = str(error).strip().split("\n")[0]
        raise DataError(
            f"{name}: no such file or folder here, and no data set that can be loaded from the hub "
            f"({reason}). Check the name; connect once to download it, or give a local file."
        ) from error
