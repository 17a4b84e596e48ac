"""Train a cell for real: through `loftq quantize` and the tasks of `loftq train`."""

from __future__ import annotations

import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from loftq import api
from loftq.integrations.device import default_device
from loftq.lab.compare.cells import Cell
from loftq.lab.compare.matrix import Learnt
from loftq.lab.compare.sizes import bits_per_weight, plan_cell
from loftq.lab.compare.store import Bytes
from loftq.lab.compare.table import lower_is_better

if TYPE_CHECKING:
    from loftq.tasks import TaskResult

AS_COUNTED, AS_STORED = 2, 4
"""Bytes of an adapter's parameter: in a result of a task, and in its file."""


class TrainingLearner:
    """Trains the cells of one model.

    Args:
        model: folder or hub id of the original model.
        device: cpu or cuda; None = the GPU if there is one.
        data: folder of the data sets; None = LOFTQ_DATA, else the hub.
        headline: task -> metric that the table shows, where it is not the task's own.
    """

    def __init__(
        self,
        model: str,
        *,
        device: str | None = None,
        data: Path | None = None,
        headline: Mapping[str, str] | None = None,
    ) -> None:
        self.model = model
        self.device = device or default_device()
        self.data = data
        self.headline = dict(headline or {})

    def quantize(self, cell: Cell, backbone: Path) -> None:
        """Make the quantized model of a cell, or finish one that was begun."""
        api.quantize(self.model, backbone, device=self.device, **self._quantization(cell))

    def learn(self, cell: Cell, run: Path, backbone: Path | None) -> Learnt:
        """Train and evaluate a cell (`matrix.Learner`)."""
        from loftq.tasks import train_task

        start = time.perf_counter()
        result = train_task(
            self.model if backbone is None else str(backbone),
            cell.task,
            run,
            data=self.data,
            device=self.device,
            **self._training(cell),
        )
        return self._learnt(cell, result, time.perf_counter() - start)

    def _training(self, cell: Cell) -> dict[str, Any]:
        """Options of a task's training; of a packed model none about its quantization."""
        if cell.arm.quantizes:
            return cell.training
        return {**cell.training, "method": cell.arm.method, **cell.adapters}

    def _quantization(self, cell: Cell) -> dict[str, Any]:
        """Options of a quantization, the text to calibrate on found among the data sets."""
        options = cell.quantization
        text = options.get("data")
        home = self.data or os.environ.get("LOFTQ_DATA")
        if text is not None and home is not None and not Path(text).exists():
            options["data"] = str(Path(home) / text)
        return options

    def _learnt(self, cell: Cell, result: TaskResult, wall: float) -> Learnt:
        primary = self.headline.get(cell.task, result.primary)
        first, *others = result.metrics
        scores = {metric: found["value"] for metric, found in result.metrics[first].items()}
        for split in others:
            found = result.metrics[split]
            scores |= {f"{metric}@{split}": score["value"] for metric, score in found.items()}
        shown = result.metrics[first][primary]
        training = float(result.summary["seconds"])
        counted = result.bytes
        trained = counted["adapter"] * AS_STORED // AS_COUNTED
        plan = plan_cell(cell, self.model, device=self.device)
        return Learnt(
            metrics=scores,
            primary=primary,
            greater_is_better=not lower_is_better(primary),
            interval=(shown["low"], shown["high"]),
            bits_per_weight=bits_per_weight(cell, plan),
            bytes=Bytes(packed=counted["backbone"], dense=counted["kept"], trained=trained),
            seconds={"training": training, "rest": max(0.0, wall - training)},
            steps=int(result.summary["steps"]),
            examples=int(shown["rows"]),
        )
