"""One sitting of a run on a task: load, tell, train, score, write."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch

from loftq.integrations.run_folder import RunFolder
from loftq.tasks.base import TaskRow
from loftq.tasks.config import TaskConfig
from loftq.tasks.inputs import TaskInputs
from loftq.tasks.result import TaskResult, read_task_result
from loftq.tasks.scoring import score_model, write_predictions
from loftq.tasks.start import Start
from loftq.tasks.trainer import TaskTrainer, build
from loftq.train import resume
from loftq.train.arguments import DTYPES, common_arguments, resolve_dtype
from loftq.train.closing import summarize
from loftq.train.config import OPTIMIZERS, Steps, TrainConfig
from loftq.train.forecast import Forecast, forecast
from loftq.train.listener import Briefing, Listener
from loftq.train.peak import PeakMeter, capacity
from loftq.train.place import Place
from loftq.train.samples import earlier_samples
from loftq.train.session import undisturbed


@dataclass(kw_only=True)
class TaskSession:
    """What one call of `train_task` works with."""

    run: RunFolder
    start: Start
    inputs: TaskInputs
    chosen: TaskConfig
    config: TrainConfig
    place: Place
    listener: Listener
    checkpoint: resume.Checkpoint | None
    """Where to go on from."""

    def carry_out(self) -> TaskResult:
        """Train, score, and write everything that a finished run holds."""
        with undisturbed():
            self._load()
            samples = self._samples_before()
            trainer = self._build()
            self._brief()
            self._train(trainer)
            self._finish(trainer, samples)
        self.place.wait()
        return read_task_result(self.run, resumed=self.first_step)

    @property
    def first_step(self) -> int:
        """Steps that earlier sittings made."""
        return self.checkpoint.step if self.checkpoint else 0

    @cached_property
    def trainable(self) -> int:
        """Parameters that are trained."""
        return sum(p.numel() for p in self.model.parameters() if p.requires_grad)

    def _load(self) -> None:
        device = self.place.device
        self.meter = PeakMeter(device)
        self.dtype = resolve_dtype(self.config.dtype, device)
        self.model = self.start.load(
            self.inputs.task,
            seed=self.config.seed,
            dtype=DTYPES[self.dtype],
            place=self.place.loading(),
        )
        self.model.config.pad_token_id = self.inputs.tokenizer.pad_token_id
        self.steps: Steps = self.config.steps(len(self.inputs.train), self.place.processes)

    def _predict(self, rows: Sequence[TaskRow]) -> list[Any]:
        inputs = self.inputs
        return inputs.task.predict(self.model, inputs.tokenizer, rows, self.chosen.reading())

    def _samples_before(self) -> list[dict[str, Any]]:
        """samples.json without the answers to come; those of an earlier sitting are kept."""
        held = self.inputs.data.validation[: self.config.samples]
        pairs = [self.inputs.task.example(row) for row in held]
        rows: list[dict[str, Any]] = [{"prompt": p, "reference": answer} for p, answer in pairs]
        kept = earlier_samples(self.run, rows)
        if kept is not None or not self.place.is_main:
            return kept or []
        texts = self._answers(held)
        found = [row | {"before": t, "after": None} for row, t in zip(rows, texts, strict=True)]
        resume.write_record(self.run.samples, found)
        return found

    def _answers(self, rows: Sequence[TaskRow]) -> list[str]:
        if not rows:
            return []
        inputs = self.inputs
        return inputs.task.answers(self.model, inputs.tokenizer, rows, self.chosen.reading())

    def _build(self) -> TaskTrainer:
        from transformers import EarlyStoppingCallback, PrinterCallback

        from loftq.train.callbacks import LastStep, Recorder

        before = 0.0
        if self.place.is_main:
            states = OPTIMIZERS[self.config.optimizer].state_bytes
            resume.check_space(self.run, self.trainable, states, self.config.keep_checkpoints)
            before = resume.rewind_metrics(self.run, self.first_step)
        task, inputs = self.inputs.task, self.inputs
        by_loss = task.selects_by_loss
        self.recorder = Recorder(
            self.run.metrics if self.place.is_main else None,
            self.listener,
            self.meter,
            capacity=capacity(self.place.device),
            seconds=before,
            scores=() if by_loss else task.metric_names,
        )
        callbacks: list[Any] = [self.recorder, LastStep()]
        if self.config.early_stop is not None:
            callbacks.append(EarlyStoppingCallback(self.config.early_stop))
        trainer = build(
            model=self.model,
            tokenizer=inputs.tokenizer,
            train=inputs.train,
            validation=inputs.validation,
            arguments=common_arguments(
                self.config,
                self.steps,
                checkpoints=self.run.checkpoints.resolve(),
                dtype=self.dtype,
                device=self.place.device,
                resumed=self.checkpoint is not None,
            ),
            collate=lambda features: task.collate(features, inputs.tokenizer),
            by_token=task.auto_class(inputs.config) == "AutoModelForCausalLM",
            best=None if by_loss else task.primary,
            score=None if by_loss else self._validate,
            callbacks=callbacks,
        )
        trainer.remove_callback(PrinterCallback)  # the listener speaks
        return trainer

    def _validate(self) -> dict[str, float]:
        rows = self.inputs.data.validation
        found = self.inputs.task.score(self._predict(rows), rows, intervals=False)
        return {name: score.value for name, score in found.items()}

    def _brief(self) -> None:
        if not self.place.is_main:
            return
        problem = self.forecast.problem
        notes = [f"task {self.inputs.task.title}", self.place.note()]
        notes.append(f"memory cannot be predicted: {problem}" if problem else "")
        briefing = Briefing(
            base=self.start.base,
            config=self.config,
            prepared=self.inputs.shown(self.config.samples),
            steps=self.steps,
            device=str(self.place.device),
            dtype=self.dtype,
            trainable=self.trainable,
            memory=self.forecast.parts,
            capacity=capacity(self.place.device),
            epoch_seconds=None,
            resumed=self.first_step,
            notes=tuple(note for note in notes if note),
        )
        self.listener.ready(briefing)

    @cached_property
    def forecast(self) -> Forecast:
        """Memory of the largest batch; unknown for a baseline."""
        return forecast(
            self.start.base.folder,
            self.config,
            kind="sft",
            longest=max(len(feature["input_ids"]) for feature in self.inputs.train),
            packing=False,
            dtype=self.dtype,
            device=self.place.device.type,
        )

    def _train(self, trainer: TaskTrainer) -> None:
        start = str(self.checkpoint.path) if self.checkpoint else None
        self.meter.start()
        try:
            trainer.train(resume_from_checkpoint=start)
        except torch.OutOfMemoryError as error:
            step = trainer.state.global_step + 1
            raise self.forecast.exhausted(step, *trainer.batch_shape) from error
        finally:
            self.meter.stop()

    def _finish(self, trainer: TaskTrainer, samples: list[dict[str, Any]]) -> None:
        """Scores and records, and what was trained last: with it the run counts as finished."""
        if not self.place.is_main:
            return
        held = self.inputs.data.validation[: self.config.samples]
        for row, text in zip(samples, self._answers(held), strict=True):
            row["after"] = text
        resume.write_record(self.run.samples, samples)
        memory = {"predicted": dict(self.forecast.parts), "measured_peak": self.meter.peak}
        resume.write_record(self.run.memory, memory)
        metrics, predictions = score_model(
            self.model,
            self.inputs.tokenizer,
            self.inputs.task,
            self.inputs.test,
            self.chosen.reading(),
        )
        write_predictions(predictions, self.run.path)
        self._record(metrics)
        summary = summarize(self.run, trainer.state, planned=self.steps.total)
        self.recorder.write_summary(
            {
                **summary,
                "seconds": round(self.recorder.seconds, 3),
                "method": self.inputs.task.kind,
                "dtype": self.dtype,
                "device": str(self.place.device),
                "task": self.inputs.task.name,
                **_flat(metrics),
            }
        )
        self.start.save(self.run, self.model, self.inputs.tokenizer)
        self.listener.finished(samples)

    def _record(self, metrics: Mapping[str, Any]) -> None:
        sizes = self.start.sizes(self.model)
        record = {
            "task": self.inputs.task.name,
            "kind": self.inputs.task.kind,
            "primary": self.inputs.task.primary,
            "metrics": metrics,
            "bytes": {**sizes, "total": sum(sizes.values())},
            "source": self.inputs.data.source,
        }
        resume.write_record(self.run.task, record)


def _flat(metrics: Mapping[str, Any]) -> dict[str, float]:
    """SPLIT_METRIC -> value, for the last row of metrics.jsonl; intervals are in task.json."""
    return {
        f"{split}_{name}": score["value"]
        for split, scores in metrics.items()
        for name, score in scores.items()
    }
