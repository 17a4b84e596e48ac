"""What a run came to."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from loftq.integrations.metrics import read_metrics
from loftq.integrations.run_folder import RunFolder


@dataclass(frozen=True, kw_only=True)
class TrainResult:
    """A finished run."""

    folder: Path
    summary: Mapping[str, Any]
    """The last row of metrics.jsonl: steps, best_step, losses, seconds, tokens, stopped_early."""
    samples: tuple[Mapping[str, Any], ...]
    """prompt, reference, before, after."""
    memory: Mapping[str, Any]
    """predicted (bytes by part) and measured_peak (bytes)."""
    resumed: int = 0
    """Step that this call went on from, 0 for a fresh run."""
    already_finished: bool = False
    """An earlier call had finished the run; nothing was done."""

    @property
    def adapter(self) -> Path:
        """Folder of the trained adapter."""
        return RunFolder(self.folder).adapter

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready."""
        found = asdict(self)
        return {**found, "folder": str(self.folder), "adapter": str(self.adapter)}


def read_result(run: RunFolder, *, resumed: int = 0, already_finished: bool = False) -> TrainResult:
    """The result of a finished run from its records."""
    return TrainResult(
        folder=run.path,
        summary=read_metrics(run.metrics).summary,
        samples=tuple(json.loads(run.samples.read_text(encoding="utf-8"))),
        memory=json.loads(run.memory.read_text(encoding="utf-8")),
        resumed=resumed,
        already_finished=already_finished,
    )
