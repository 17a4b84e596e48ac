"""One call that trains a run: what training on data and training for a task have in common."""

from __future__ import annotations

import contextlib
import warnings
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch

from loftq.integrations.run_folder import RunFolder
from loftq.integrations.training import fuse_for_training, undo_training
from loftq.train import resume
from loftq.train.arguments import common_arguments, resolve_dtype
from loftq.train.base import Base
from loftq.train.closing import summarize
from loftq.train.config import OPTIMIZERS, Steps, TrainConfig
from loftq.train.errors import TrainError
from loftq.train.forecast import Forecast
from loftq.train.graphs import why_not
from loftq.train.keep import require_blocks
from loftq.train.listener import Briefing, Listener
from loftq.train.masks import layers_of
from loftq.train.offload import HostInputs, why_not_offloaded
from loftq.train.peak import PeakMeter, capacity
from loftq.train.place import Place
from loftq.train.samples import earlier_samples


@dataclass(kw_only=True)
class Sitting(ABC):
    """Load, tell, train, answer, write. A kind of training says what each of these is for it."""

    run: RunFolder
    config: TrainConfig
    """Resolved for the kind of data."""
    place: Place
    listener: Listener
    checkpoint: resume.Checkpoint | None
    """Where to go on from."""
    model: Any = field(init=False, repr=False)
    steps: Steps = field(init=False)
    meter: PeakMeter = field(init=False, repr=False)
    dtype: str = field(init=False)
    layer_note: str = field(init=False)
    """Which modules the training layer computes, or "" without it."""
    recorder: Any = field(init=False, repr=False)

    @property
    @abstractmethod
    def forecast(self) -> Forecast:
        """Memory of the largest batch."""

    @property
    @abstractmethod
    def kind(self) -> str:
        """Kind of training, for the summary."""

    @abstractmethod
    def _load(self) -> None:
        """Set `meter`, once all libraries are loaded, then `model` and `steps`."""

    @abstractmethod
    def _build(self) -> Any:
        """The trainer, with `_callbacks` and `_arguments`."""

    @abstractmethod
    def _brief(self) -> None:
        """Tell the listener; on the main process."""

    @abstractmethod
    def _asked(self) -> list[dict[str, Any]]:
        """prompt and reference of the samples."""

    @abstractmethod
    def _answers(self) -> list[str]:
        """The model's answers to them."""

    @abstractmethod
    def _scored(self) -> Mapping[str, Any]:
        """Write what this kind of training finds out about the trained model; for the summary."""

    @abstractmethod
    def _save(self) -> None:
        """Write what was trained: with it the run counts as finished."""

    def carry_out(self) -> None:
        """Train, and write everything that a finished run holds."""
        with undisturbed():
            self.dtype = resolve_dtype(self.config.dtype, self.place.device)
            self._load()
            self._check_graphs()
            self._check_kept()
            self.layer_note = self._fuse() if self.config.fused else ""
            samples = self._samples_before()
            trainer = self._build()
            if self.config.offload:
                trainer.offload = HostInputs(self.place.device)
            if self.place.is_main:
                self._brief()
            self._train(trainer)
            if self.place.is_main:
                self._finish(trainer, samples)
        self.place.wait()

    def _fuse(self) -> str:
        """Put the training layer in place and say so; a baseline without packed layers has none."""
        plan = fuse_for_training(self.model)
        if plan.grouped:
            return str(plan)
        undo_training(self.model)
        return f"without the training layer: {plan.reasons}" if plan.left else ""

    def _check_graphs(self) -> None:
        """Raise where steps were to be captured and cannot be.

        Raises:
            TrainError: with the reason.
        """
        if not self.config.graphs:
            return
        place = self.place
        reason = why_not(
            self.model,
            place.device,
            processes=place.processes,
            dtype=self.dtype,
            checkpointing=self.config.checkpointing,
        )
        if self.kind == "preference":
            reason = "a loss on preferences waits for the host"
        if reason:
            raise TrainError(f"graphs=true: {reason}. Leave it out.")

    def _check_kept(self) -> None:
        """Raise where checkpointing cannot keep what it was to keep, or not where.

        Raises:
            TrainError: with the reason.
        """
        require_blocks(self.config.keep_blocks, len(layers_of(self.model)))
        reason = why_not_offloaded(
            self.place.device,
            checkpointing=self.config.checkpointing,
            graphs=self.config.graphs,
        )
        if self.config.offload and reason:
            raise TrainError(f"offload=true: {reason}. Leave it out.")

    @property
    def first_step(self) -> int:
        """Steps that earlier sittings made."""
        return self.checkpoint.step if self.checkpoint else 0

    @cached_property
    def trainable(self) -> int:
        """Parameters that are trained."""
        return sum(p.numel() for p in self.model.parameters() if p.requires_grad)

    def _samples_before(self) -> list[dict[str, Any]]:
        """samples.json without the answers to come; those of an earlier sitting are kept."""
        rows = self._asked()
        kept = earlier_samples(self.run, rows)
        if kept is not None or not self.place.is_main:
            return kept or []
        texts = self._answers()
        found = [row | {"before": t, "after": None} for row, t in zip(rows, texts, strict=True)]
        resume.write_record(self.run.samples, found)
        return found

    def _callbacks(self, *, scores: Sequence[str] = ()) -> list[Any]:
        """Record every step (and `scores` of validations), stop where it is time to.

        Raises:
            TrainError: no space for the checkpoints.
        """
        from transformers import EarlyStoppingCallback

        from loftq.train.callbacks import KeptBlocks, LastStep, Recorder

        before = 0.0
        if self.place.is_main:
            states = OPTIMIZERS[self.config.optimizer].state_bytes
            resume.check_space(self.run, self.trainable, states, self.config.keep_checkpoints)
            before = resume.rewind_metrics(self.run, self.first_step)
        self.recorder = Recorder(
            self.run.metrics if self.place.is_main else None,
            self.listener,
            self.meter,
            capacity=capacity(self.place.device),
            seconds=before,
            scores=scores,
        )
        callbacks: list[Any] = [self.recorder, LastStep()]
        if self.config.keep_blocks:
            callbacks.append(KeptBlocks(self.config.keep_blocks))
        if self.config.early_stop is not None:
            callbacks.append(EarlyStoppingCallback(self.config.early_stop))
        return callbacks

    def _arguments(self) -> dict[str, Any]:
        return common_arguments(
            self.config,
            self.steps,
            checkpoints=self.run.checkpoints.resolve(),
            dtype=self.dtype,
            device=self.place.device,
            resumed=self.checkpoint is not None,
        )

    def _tell(
        self, base: Base, prepared: Any, notes: Sequence[str], *, epoch_seconds: float | None
    ) -> None:
        """What the listener hears before the first step; empty notes are left out."""
        problem = self.forecast.problem
        notes = [
            *notes,
            self.layer_note,
            f"memory cannot be predicted: {problem}" if problem else "",
        ]
        briefing = Briefing(
            base=base,
            config=self.config,
            prepared=prepared,
            steps=self.steps,
            device=str(self.place.device),
            dtype=self.dtype,
            trainable=self.trainable,
            memory=self.forecast.parts,
            capacity=capacity(self.place.device),
            epoch_seconds=epoch_seconds,
            resumed=self.first_step,
            notes=tuple(note for note in notes if note),
        )
        self.listener.ready(briefing)

    def _train(self, trainer: Any) -> None:
        from transformers import PrinterCallback

        trainer.remove_callback(PrinterCallback)  # the listener speaks
        start = str(self.checkpoint.path) if self.checkpoint else None
        self.meter.start()
        try:
            trainer.train(resume_from_checkpoint=start)
        except torch.OutOfMemoryError as error:
            step = trainer.state.global_step + 1
            raise self.forecast.exhausted(step, *trainer.batch_shape) from error
        finally:
            self.meter.stop()

    def _finish(self, trainer: Any, samples: list[dict[str, Any]]) -> None:
        for row, text in zip(samples, self._answers(), strict=True):
            row["after"] = text
        resume.write_record(self.run.samples, samples)
        memory = {"predicted": dict(self.forecast.parts), "measured_peak": self.meter.peak}
        resume.write_record(self.run.memory, memory)
        more = dict(self._scored())
        if trainer.graphs is not None:
            more["graphs"] = trainer.graphs.told
        if trainer.offload is not None:
            more["offload"] = trainer.offload.told
        summary = summarize(self.run, trainer.state, planned=self.steps.total)
        self.recorder.write_summary(
            {
                **summary,
                "seconds": round(self.recorder.seconds, 3),
                "method": self.kind,
                "dtype": self.dtype,
                "device": str(self.place.device),
                **more,
            }
        )
        self._save()
        self.listener.finished(samples)


@contextlib.contextmanager
def undisturbed() -> Iterator[None]:
    """Without the bars of `datasets`, and what transformers and TRL deprecate of each other."""
    import datasets

    shown = datasets.is_progress_bar_enabled()
    datasets.disable_progress_bars()
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", ".* will be removed in v", FutureWarning)
            yield
    finally:
        if shown:
            datasets.enable_progress_bars()
