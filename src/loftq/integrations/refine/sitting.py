"""One stage of a refinement in progress: what is finished is on disk, and is taken over later."""

from __future__ import annotations

import io
import json
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from loftq.calibration import TokenWindows
from loftq.checkpoint.durable import publish, write_partial
from loftq.integrations.blocks import CheckpointBlocks
from loftq.ops.precision import full_float32
from loftq.refine import Batches, Descent, Progress, Stage, Trajectory, descend
from loftq.refine.descent import Loss

Listener = Callable[["Step"], object]


@dataclass(frozen=True, kw_only=True)
class Step:
    """Progress of a refinement."""

    stage: int
    """From 1."""
    stages: int
    scope: str
    done: int
    """Units of this stage that are finished."""
    units: int
    share: float
    """Of the unit in work, 0 to 1."""
    loss: float | None
    """Of the last step; None when a unit was taken over."""
    seconds_left: float | None
    """Of this stage, from its pace so far; None at its beginning."""


@dataclass
class Sitting:
    """The work on one stage.

    Args:
        folder: where its state lies.
        number: of the stage, from 0.
        stages: how many there are.
        stage: the row.
        windows: the text.
        open_original: makes the original model, streamed from its checkpoint.
        units: how many there will be.
        seed: of the order of batches.
        listener: progress.
    """

    folder: Path
    number: int
    stages: int
    stage: Stage
    windows: TokenWindows
    open_original: Callable[[], CheckpointBlocks]
    units: int
    seed: int
    listener: Listener
    rows: list[dict[str, Any]] = field(default_factory=list)
    """What became of each unit, in order."""
    _begin: float = field(default_factory=time.perf_counter)
    _taken: int = 0

    def take_over(self, unit: str, factors: Mapping[str, nn.Parameter]) -> bool:
        """Fill the factors of a unit from an earlier process, if it had finished it."""
        found = self._read(unit)
        if found is None:
            return False
        with torch.no_grad():
            for name, parameter in factors.items():
                parameter.copy_(found["factors"][name])
        self.rows.append(json.loads(found["row"]))
        self._taken += 1
        self._tell(0.0, None)
        return True

    def settle(self, unit: str, factors: Mapping[str, nn.Parameter], found: Trajectory) -> None:
        """Keep the factors of a unit that is finished."""
        row = {"unit": unit, **found.to_dict()}
        kept = {name: p.detach().cpu() for name, p in factors.items()}
        self._write(unit, {"factors": kept, "row": json.dumps(row)})
        self._file(f"{unit}.part").unlink(missing_ok=True)
        self.rows.append(row)
        self._tell(0.0, found.best)

    def descend(
        self,
        parameters: list[Tensor],
        loss: Loss,
        batches: Batches,
        *,
        resumable: str | None = None,
    ) -> Trajectory:
        """`refine.descend` as the stage says; with a name, each pass is kept under it."""
        how = Descent(epochs=self.stage.epochs, rate=self.stage.rate, seed=self.seed)
        name = f"{resumable}.part"
        with full_float32():
            return descend(
                parameters,
                loss,
                batches,
                how,
                state=self._read(name) if resumable else None,
                keep=(lambda state: self._write(name, state)) if resumable else None,
                on_step=self._on_step,
            )

    def _on_step(self, at: Progress) -> None:
        self._tell(at.step / at.steps, at.loss)

    def _tell(self, share: float, loss: float | None) -> None:
        done = len(self.rows) - self._taken + share
        spent = time.perf_counter() - self._begin
        left = self.units - self._taken - done
        self.listener(
            Step(
                stage=self.number + 1,
                stages=self.stages,
                scope=self.stage.scope,
                done=len(self.rows),
                units=self.units,
                share=share,
                loss=loss,
                seconds_left=spent / done * left if done else None,
            )
        )

    def _file(self, name: str) -> Path:
        return self.folder / f"{self.number}-{name}.pt"

    def _write(self, name: str, value: Mapping[str, Any]) -> None:
        buffer = io.BytesIO()
        torch.save(dict(value), buffer)
        path = self._file(name)
        write_partial(path, buffer.getvalue())
        publish(path)

    def _read(self, name: str) -> dict[str, Any] | None:
        path = self._file(name)
        if not path.exists():
            return None
        return torch.load(path, map_location="cpu", weights_only=True)
