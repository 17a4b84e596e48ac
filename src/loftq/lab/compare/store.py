"""Rows of a comparison on disk: one file each, whole or not there."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from loftq.checkpoint.durable import publish, write_partial
from loftq.lab.compare.cells import Cell

ROW_VERSION = 1
DONE, FAILED, DIVERGED = "done", "failed", "diverged"


@dataclass(frozen=True, kw_only=True)
class Bytes:
    """What a fine-tuned model takes when it is stored."""

    packed: int
    """Codes, scales, zeros; 0 where nothing is quantized."""
    dense: int
    """Everything else of the base, at 16 bits a parameter."""
    trained: int
    """Adapters and task head, float32 as they are stored; 0 where the base itself is trained."""

    @property
    def total(self) -> int:
        """All of it."""
        return self.packed + self.dense + self.trained


@dataclass(frozen=True, kw_only=True)
class Row:
    """What became of a cell."""

    cell: str
    """Its name."""
    digest: str
    """Identity of its settings."""
    task: str
    method: str
    """The arm, options included."""
    format: str | None
    rank: int | None
    seed: int
    status: str
    """done, diverged (no number: it did not converge), failed."""
    metrics: Mapping[str, float] = field(default_factory=dict)
    """Name -> value on the split that is reported."""
    primary: str | None = None
    """The metric that the table shows."""
    greater_is_better: bool = True
    interval: tuple[float, float] | None = None
    """95 % of the primary metric, for other rows of the same kind; seeds are another spread."""
    bits_per_weight: float | None = None
    """Of the quantized weights, scales included; 16 where nothing is quantized."""
    bytes: Bytes | None = None
    options: Mapping[str, Any] = field(default_factory=dict)
    """As resolved for this cell."""
    seconds: Mapping[str, float] = field(default_factory=dict)
    """training, evaluation."""
    steps: int | None = None
    examples: int | None = None
    """Rows that the metrics are over."""
    machine: Mapping[str, str] = field(default_factory=dict)
    """Device, versions, commit, date."""
    error: str | None = None

    @property
    def value(self) -> float | None:
        """The primary metric; None without one."""
        return self.metrics.get(self.primary) if self.primary else None

    @property
    def line(self) -> tuple[str, str | None, int | None]:
        """The line of the table that it belongs to."""
        return self.method, self.format, self.rank

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready; numbers that JSON lacks become None."""
        found = {"version": ROW_VERSION, **asdict(self)}
        found["metrics"] = {k: v if math.isfinite(v) else None for k, v in self.metrics.items()}
        return found

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Row:
        """Inverse of to_dict.

        Raises:
            ValueError: a version or key that this release does not know.
        """
        values = dict(values)
        version = values.pop("version", None)
        unknown = sorted(set(values) - {f.name for f in fields(cls)})
        if version != ROW_VERSION or unknown:
            raise ValueError(f"version {version!r}, unknown keys {unknown}")
        if values.get("bytes") is not None:
            values["bytes"] = Bytes(**values["bytes"])
        if values.get("interval") is not None:
            values["interval"] = tuple(values["interval"])
        values["metrics"] = {
            key: math.nan if value is None else value for key, value in values["metrics"].items()
        }
        return cls(**values)


class RowStore:
    """The folder of the rows.

    Args:
        folder: made when the first row is written.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def put(self, row: Row) -> None:
        """Keep a row; it appears whole or not at all."""
        self.folder.mkdir(parents=True, exist_ok=True)
        path = self.folder / f"{row.cell}.json"
        text = json.dumps(row.to_dict(), indent=2, ensure_ascii=False, allow_nan=False) + "\n"
        write_partial(path, text.encode())
        publish(path)

    def find(self, cell: Cell) -> Row | None:
        """The row of a cell, None if there is none yet.

        Raises:
            ValueError: a row that cannot be read, or one that was made with other settings.
        """
        path = self.folder / f"{cell.name}.json"
        if not path.is_file():
            return None
        row = _read(path)
        if row.digest != cell.digest:
            raise ValueError(
                f"{path}: made with other settings ({_difference(row.options, cell.options)}). "
                "Choose another folder with -o, or remove the file to train this cell again."
            )
        return row

    def __iter__(self) -> Iterator[Row]:
        return (_read(path) for path in sorted(self.folder.glob("*.json")))


def _read(path: Path) -> Row:
    try:
        return Row.from_dict(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise ValueError(
            f"{path}: no row of a comparison ({error}). Remove it to train this cell again."
        ) from error


def _difference(then: Mapping[str, Any], now: Mapping[str, Any]) -> str:
    changed = [
        f"{key}: {then.get(key)!r} then, {now.get(key)!r} now"
        for key in sorted(then.keys() | now.keys())
        if then.get(key) != now.get(key)
    ]
    return "; ".join(changed) or "the base or the method"
