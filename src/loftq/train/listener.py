"""What a run tells while it works; the command line prints it, a script may ignore it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from loftq.integrations.refine import Step
    from loftq.pipeline.plan import Batch, Plan
    from loftq.train.base import Base
    from loftq.train.config import Steps, TrainConfig
    from loftq.train.data import Prepared
    from loftq.train.memory.fit import Fit


@dataclass(frozen=True, kw_only=True)
class Briefing:
    """Everything that is known before the first step."""

    base: Base
    config: TrainConfig
    prepared: Prepared
    steps: Steps
    device: str
    dtype: str
    trainable: int
    """Parameters of the adapter."""
    memory: Mapping[str, int]
    """Predicted bytes at the peak by part; empty where nothing can be said."""
    capacity: int | None
    """Bytes of memory that the device has."""
    epoch_seconds: float | None
    """Of one epoch, guessed from one forward pass."""
    resumed: int
    """Step of the checkpoint that the run goes on from, 0 for a fresh run."""
    notes: tuple[str, ...]
    """Choices worth a line: method of training, packing, devices."""


@dataclass(frozen=True, kw_only=True)
class Pace:
    """How far a run is."""

    step: int
    total: int
    seconds_left: float | None
    """By the mean of the steps so far, validations included."""
    epoch_seconds: float | None
    """Of one epoch, in the same way; None until the first step, which is slow, is left behind."""
    capacity: int | None
    """Bytes of memory that the device has."""


class Listener:
    """Follows a run; each method may be left as it is. Only the main process calls them."""

    def quantizing(self, plan: Plan, folder: Path) -> None:
        """MODEL is full precision: it is quantized into `folder`."""

    def calibrated(self, path: str, done: int, total: int) -> None:
        """The statistics of a block are taken (integrations.calibrate.OnBlock)."""

    def quantized(self, batch: Batch, records: list[Mapping[str, Any]], resumed: bool) -> None:
        """A batch of layers is done (pipeline.run.OnBatch)."""

    def refined(self, step: Step) -> None:
        """A step of the refinement of the start is done (integrations.refine.Step)."""

    def quantizing_done(self) -> None:
        """The backbone is complete."""

    def fitted(self, fit: Fit) -> None:
        """`memory` was given: what was chosen for it, each with its reason."""

    def ready(self, briefing: Briefing) -> None:
        """Everything is loaded; the first step comes next."""

    def step(self, row: Mapping[str, Any], pace: Pace) -> None:
        """A row of metrics.jsonl about a step."""

    def reading(self, what: str, done: int, total: int) -> None:
        """Of a validation or the last scoring so many `what` (batches, rows) are read."""

    def validation(self, row: Mapping[str, Any], pace: Pace) -> None:
        """A row of metrics.jsonl about a validation."""

    def finished(self, samples: Sequence[Mapping[str, Any]]) -> None:
        """Training is over; the rows of samples.json."""
