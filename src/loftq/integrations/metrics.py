"""metrics.jsonl of a run, for its report and its model card."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any


@dataclass
class Metrics:
    """metrics.jsonl of a run: one row a step, the last one where a resumed run wrote it twice."""

    train: list[Mapping[str, Any]] = field(default_factory=list)
    validation: list[Mapping[str, Any]] = field(default_factory=list)
    summary: Mapping[str, Any] = field(default_factory=dict)
    unreadable: int = 0
    """Lines that are not JSON objects, as a killed process leaves one."""

    @property
    def best(self) -> Mapping[str, Any] | None:
        """The row of the lowest validation loss."""
        rows = [row for row in self.validation if math.isfinite(row["validation_loss"])]
        return min(rows, key=lambda row: row["validation_loss"], default=None)


UNITS = {
    "preference": "nats per pair",
    "classification": "nats per row",
    "regression": "squared error",
    "spans": "nats per position",
}
"""What a loss counts, by the format of the data; all others are in nats per token."""


def loss_unit(data: Mapping[str, Any]) -> str:
    """What the losses of a run count, by data.json."""
    return UNITS.get(str(data.get("format")), "nats per token")


def read_metrics(path: Path) -> Metrics:
    """metrics.jsonl: rows of training, rows of validation, the summary."""
    train: dict[float, Mapping[str, Any]] = {}
    validation: dict[float, Mapping[str, Any]] = {}
    metrics = Metrics()
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            row = json.loads(line)
        except ValueError:
            metrics.unreadable += 1
            continue
        if isinstance(row, dict) and isinstance(row.get("summary"), dict):
            metrics.summary = row["summary"]
        elif isinstance(row, dict) and _is_number(row.get("step")):
            if _is_number(row.get("validation_loss")):
                validation[row["step"]] = row
            if _is_number(row.get("loss")):
                train[row["step"]] = row
        else:
            metrics.unreadable += 1
    metrics.train = [train[step] for step in sorted(train)]
    metrics.validation = [validation[step] for step in sorted(validation)]
    return metrics


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
