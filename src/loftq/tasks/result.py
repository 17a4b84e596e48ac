"""What a run on a task came to."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from loftq.integrations.metrics import read_metrics
from loftq.integrations.run_folder import RunFolder


@dataclass(frozen=True, kw_only=True)
class TaskResult:
    """A finished run on a task."""

    folder: Path
    task: str
    metrics: Mapping[str, Mapping[str, Mapping[str, Any]]]
    """Split -> metric -> value, low, high, rows, interval."""
    primary: str
    """The headline metric."""
    bytes: Mapping[str, int]
    """backbone (packed weights), kept (16-bit parts), adapter (with the head, 16-bit), total."""
    summary: Mapping[str, Any]
    """The last row of metrics.jsonl."""
    memory: Mapping[str, Any]
    """predicted (bytes by part) and measured_peak (bytes)."""
    resumed: int = 0
    """Step that this call went on from, 0 for a fresh run."""
    already_finished: bool = False
    """An earlier call had finished the run; nothing was done."""

    @property
    def value(self) -> float:
        """The headline: the primary metric on the first reported split."""
        return float(next(iter(self.metrics.values()))[self.primary]["value"])

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready."""
        return {**asdict(self), "folder": str(self.folder), "value": self.value}


def read_task_result(
    run: RunFolder, *, resumed: int = 0, already_finished: bool = False
) -> TaskResult:
    """The result of a finished run from its records."""
    found = json.loads(run.task.read_text(encoding="utf-8"))
    return TaskResult(
        folder=run.path,
        task=found["task"],
        metrics=found["metrics"],
        primary=found["primary"],
        bytes=found["bytes"],
        summary=read_metrics(run.metrics).summary,
        memory=json.loads(run.memory.read_text(encoding="utf-8")),
        resumed=resumed,
        already_finished=already_finished,
    )
