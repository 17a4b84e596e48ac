"""One sitting of a run: load, tell, train, answer, write."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from importlib import import_module
from typing import Any

import torch

from loftq import api
from loftq.integrations.run_folder import RunFolder
from loftq.train import resume
from loftq.train.arguments import DTYPES, common_arguments, resolve_dtype
from loftq.train.base import Base
from loftq.train.closing import summarize, write_adapter
from loftq.train.config import OPTIMIZERS, Steps, TrainConfig
from loftq.train.errors import TrainError
from loftq.train.forecast import Forecast, forecast
from loftq.train.inputs import Inputs, longest_row
from loftq.train.listener import Briefing, Listener
from loftq.train.pace import epoch_seconds
from loftq.train.packing import keeps_apart
from loftq.train.peak import PeakMeter, capacity
from loftq.train.place import Place
from loftq.train.result import TrainResult, read_result
from loftq.train.samples import answer, earlier_samples

TRAINERS = {"sft": "loftq.train.sft", "preference": "loftq.train.dpo"}
"""Kind of data -> the module that arranges its rows and builds its trainer."""
METHODS = {
    "sft": "supervised fine-tuning (TRL's SFTTrainer)",
    "preference": "direct preference optimization (TRL's DPOTrainer), because the data holds "
    "preferences; its reference is the adapter that training starts from",
}


PACKED = "short rows are packed together, each attending to itself only"
PADDED = "rows are padded, not packed: this model's attention would let them see each other"


@dataclass(kw_only=True)
class Session:
    """What one call of `train` works with."""

    run: RunFolder
    base: Base
    inputs: Inputs
    config: TrainConfig
    """Resolved for the kind of data."""
    place: Place
    listener: Listener
    checkpoint: resume.Checkpoint | None
    """Where to go on from."""
    packing_note: str = ""

    def carry_out(self) -> TrainResult:
        """Train, and write everything that a finished run holds."""
        with undisturbed():
            self._load()
            samples = self._samples_before()
            trainer = self._build()
            self._brief()
            self._train(trainer)
            self._finish(trainer, samples)
        self.place.wait()
        return read_result(self.run, resumed=self.first_step)

    @property
    def first_step(self) -> int:
        """Steps that earlier sittings made."""
        return self.checkpoint.step if self.checkpoint else 0

    @cached_property
    def trainable(self) -> int:
        """Parameters of the adapter."""
        return sum(p.numel() for p in self.model.parameters() if p.requires_grad)

    def _load(self) -> None:
        device = self.place.device
        self.trainers = import_module(TRAINERS[self.inputs.prepared.kind])  # before it is measured
        self.meter = PeakMeter(device)
        self.dtype = resolve_dtype(self.config.dtype, device)
        self.model = api.load(
            self.base.folder,
            adapter=self.base.adapter,
            trainable=True,
            dtype=DTYPES[self.dtype],
            **self.place.loading(),
            **({"embedding": "host"} if self.config.host_embedding else {}),
        )
        self.packing = self._packing()
        rows = self.trainers.arrange(self.inputs.prepared, packing=self.packing)
        self.train_rows, self.validation_rows = rows
        self.steps: Steps = self.config.steps(len(self.train_rows), self.place.processes)

    def _packing(self) -> bool:
        wanted, prepared = self.config.packing, self.inputs.prepared
        text = prepared.kind == "sft" and prepared.counts.format == "text"
        if wanted is False or (wanted is None and not text):
            return False
        if prepared.kind != "sft":
            raise TrainError("packing=true: preferences come in pairs and are not packed.")
        if keeps_apart(self.model, len(self.inputs.tokenizer)):
            self.packing_note = PACKED
            return True
        if wanted:
            raise TrainError(
                "packing=true: this model's attention would let packed rows see each other. Leave "
                "packing out; rows are padded instead."
            )
        self.packing_note = PADDED
        return False

    def _samples_before(self) -> list[dict[str, Any]]:
        """samples.json without the answers to come; those of an earlier sitting are kept."""
        held = self.inputs.prepared.prompts[: self.config.samples]
        rows: list[dict[str, Any]] = [
            {"prompt": p.prompt_text, "reference": p.reference} for p in held
        ]
        kept = earlier_samples(self.run, rows)
        if kept is not None or not self.place.is_main:
            return kept or []
        texts = self._answer()
        found = [row | {"before": t, "after": None} for row, t in zip(rows, texts, strict=True)]
        resume.write_record(self.run.samples, found)
        return found

    def _answer(self) -> list[str]:
        return answer(
            self.model,
            self.inputs.tokenizer,
            [p.prompt_ids for p in self.inputs.prepared.prompts[: self.config.samples]],
            tokens=self.config.sample_tokens,
            stop=self.inputs.stop,
        )

    def _build(self) -> Any:
        from transformers import EarlyStoppingCallback, PrinterCallback

        from loftq.train.callbacks import LastStep, Recorder

        if self.place.is_main:
            states = OPTIMIZERS[self.config.optimizer].state_bytes
            resume.check_space(self.run, self.trainable, states, self.config.keep_checkpoints)
            before = resume.rewind_metrics(self.run, self.first_step)
        else:
            before = 0.0
        self.recorder = Recorder(
            self.run.metrics if self.place.is_main else None,
            self.listener,
            self.meter,
            capacity=capacity(self.place.device),
            seconds=before,
        )
        callbacks: list[Any] = [self.recorder, LastStep()]
        if self.config.early_stop is not None:
            callbacks.append(EarlyStoppingCallback(self.config.early_stop))
        trainer = self.trainers.build(
            model=self.model,
            tokenizer=self.inputs.tokenizer,
            train=self.train_rows,
            validation=self.validation_rows,
            arguments=common_arguments(
                self.config,
                self.steps,
                checkpoints=self.run.checkpoints.resolve(),
                dtype=self.dtype,
                device=self.place.device,
                resumed=self.checkpoint is not None,
            ),
            packing=self.packing,
            max_length=self.inputs.prepared.counts.max_length,
            beta=self.config.beta,
            callbacks=callbacks,
        )
        trainer.remove_callback(PrinterCallback)  # the listener speaks
        return trainer

    def _brief(self) -> None:
        if not self.place.is_main:
            return
        problem = self.forecast.problem
        notes = [METHODS[self.inputs.prepared.kind], self.place.note(), self.packing_note]
        notes.append(f"memory cannot be predicted: {problem}" if problem else "")
        briefing = Briefing(
            base=self.base,
            config=self.config,
            prepared=self.inputs.prepared,
            steps=self.steps,
            device=str(self.place.device),
            dtype=self.dtype,
            trainable=self.trainable,
            memory=self.forecast.parts,
            capacity=capacity(self.place.device),
            epoch_seconds=self._guess(),
            resumed=self.first_step,
            notes=tuple(note for note in notes if note),
        )
        self.listener.ready(briefing)

    @cached_property
    def forecast(self) -> Forecast:
        """Memory of the largest batch."""
        return forecast(
            self.base.folder,
            self.config,
            kind=self.inputs.prepared.kind,
            longest=longest_row(self.inputs),
            packing=self.packing,
            dtype=self.dtype,
            device=self.place.device.type,
        )

    def _guess(self) -> float | None:
        if self.inputs.prepared.kind != "sft":
            return None
        return epoch_seconds(
            self.model,
            self.inputs.prepared.train[0]["input_ids"],
            tokens=self.inputs.prepared.counts.tokens // self.place.processes,
            checkpointing=self.config.checkpointing,
        )

    def _train(self, trainer: Any) -> None:
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
        """Answers, records, and the adapter last: with it the run counts as finished."""
        if not self.place.is_main:
            return
        for row, text in zip(samples, self._answer(), strict=True):
            row["after"] = text
        resume.write_record(self.run.samples, samples)
        memory = {"predicted": dict(self.forecast.parts), "measured_peak": self.meter.peak}
        resume.write_record(self.run.memory, memory)
        summary = summarize(self.run, trainer.state, planned=self.steps.total)
        self.recorder.write_summary(
            {
                **summary,
                "seconds": round(self.recorder.seconds, 3),
                "method": self.inputs.prepared.kind,
                "dtype": self.dtype,
                "device": str(self.place.device),
            }
        )
        write_adapter(self.run, self.model, self.inputs.tokenizer, self.base.backbone)
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
