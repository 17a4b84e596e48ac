"""One sitting of a run on a task: load, tell, train, score, write."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

from loftq.tasks.anchor import AnchoredTrainer
from loftq.tasks.base import Reading, TaskRow
from loftq.tasks.config import NOT_HERE, TaskConfig
from loftq.tasks.inputs import TaskInputs
from loftq.tasks.scoring import score_model, write_predictions
from loftq.tasks.start import Start
from loftq.tasks.trainer import TaskTrainer, build
from loftq.train import resume
from loftq.train.arguments import DTYPES
from loftq.train.forecast import Forecast, forecast
from loftq.train.graphs import Collator, Rounded
from loftq.train.padding import IGNORED
from loftq.train.peak import PeakMeter
from loftq.train.sitting import Sitting


@dataclass(kw_only=True)
class TaskSession(Sitting):
    """What one call of `train_task` works with."""

    start: Start
    inputs: TaskInputs
    chosen: TaskConfig

    @property
    def kind(self) -> str:
        """That of the task."""
        return self.inputs.task.kind

    def _load(self) -> None:
        self.meter = PeakMeter(self.place.device)
        self.model = self.start.load(
            self.inputs.task,
            seed=self.config.seed,
            dtype=DTYPES[self.dtype],
            place=self.place.loading(),
        )
        self.model.config.pad_token_id = self.inputs.tokenizer.pad_token_id
        self.steps = self.config.steps(len(self.inputs.train), self.place.processes)

    def _predict(self, rows: Sequence[TaskRow]) -> list[Any]:
        inputs = self.inputs
        return inputs.task.predict(self.model, inputs.tokenizer, rows, self._reading())

    def _reading(self) -> Reading:
        """How the model is asked, the listener told of it."""
        return replace(
            self.chosen.reading(),
            on_batch=lambda done, total: self.listener.reading("rows", done, total),
        )

    def _asked(self) -> list[dict[str, Any]]:
        pairs = [self.inputs.task.example(row) for row in self._held()]
        return [{"prompt": prompt, "reference": wanted} for prompt, wanted in pairs]

    def _answers(self) -> list[str]:
        held, inputs = self._held(), self.inputs
        if not held:
            return []
        return inputs.task.answers(self.model, inputs.tokenizer, held, self.chosen.reading())

    def _held(self) -> Sequence[TaskRow]:
        return self.inputs.data.validation[: self.config.samples]

    def _build(self) -> TaskTrainer:
        task, inputs = self.inputs.task, self.inputs
        by_loss = task.selects_by_loss
        callbacks = self._callbacks(scores=() if by_loss else task.metric_names)
        trainer = build(
            AnchoredTrainer,
            model=self.model,
            tokenizer=inputs.tokenizer,
            train=inputs.train,
            validation=inputs.validation,
            arguments=self._arguments(),
            collate=self._collator(),
            graphs=self.config.graphs,
            by_token=task.auto_class(inputs.config) == "AutoModelForCausalLM",
            best=None if by_loss else task.primary,
            score=None if by_loss else self._validate,
            callbacks=callbacks,
        )
        if self.chosen.kl:
            trainer.anchor(self.chosen.kl)
        return trainer

    def _collator(self) -> Collator:
        """The task's; with graphs its batches have few widths."""
        task, tokenizer = self.inputs.task, self.inputs.tokenizer

        def collate(features: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
            return task.collate(features, tokenizer)

        if not self.config.graphs:
            return collate
        fill = {"input_ids": tokenizer.pad_token_id, "labels": IGNORED}
        fill |= {"attention_mask": 0, "token_type_ids": 0}
        return Rounded(collate, self.inputs.length, fill)

    def _validate(self) -> dict[str, float]:
        rows = self.inputs.data.validation
        found = self.inputs.task.score(self._predict(rows), rows, intervals=False)
        return {name: score.value for name, score in found.items()}

    def _brief(self) -> None:
        prepared = self.inputs.shown(self.config.samples)
        notes = [f"task {self.inputs.task.title}", self.place.note()]
        self._tell(self.start.base, prepared, notes, epoch_seconds=None)

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
            without=NOT_HERE,
        )

    def _scored(self) -> Mapping[str, Any]:
        metrics, predictions = score_model(
            self.model,
            self.inputs.tokenizer,
            self.inputs.task,
            self.inputs.test,
            self._reading(),
        )
        write_predictions(predictions, self.run.path)
        self._record(metrics)
        return {"task": self.inputs.task.name, **_flat(metrics)}

    def _save(self) -> None:
        self.start.save(self.run, self.model, self.inputs.tokenizer)

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
