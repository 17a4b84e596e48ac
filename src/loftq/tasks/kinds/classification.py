"""Sentences and pairs of sentences with a class or a number: GLUE, ANLI."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from loftq.tasks.base import Reading, Task, TaskRow
from loftq.tasks.lengths import reading_length

if TYPE_CHECKING:
    from loftq.tasks.scores import Score


@dataclass(frozen=True, kw_only=True)
class _Labelled(Task):
    """One or two texts and a label."""

    metrics: tuple[str, ...]
    """Names of rows of METRICS."""

    packages: ClassVar[tuple[str, ...]] = ("sklearn", "scipy")
    new_head: ClassVar[bool] = True
    selects_by_loss: ClassVar[bool] = False

    @property
    def texts(self) -> tuple[str, ...]:
        """Columns of the sentences."""
        return tuple(name for name in self.columns if name != "label")

    @property
    def metric_names(self) -> tuple[str, ...]:
        return self.metrics

    def auto_class(self, config: Any) -> str:
        return "AutoModelForSequenceClassification"

    def problem(self, values: Mapping[str, Any]) -> str:
        bad = next((name for name in self.texts if not isinstance(values[name], str)), None)
        if bad is not None:
            return f"{bad} is {values[bad]!r}; expected text."
        return self.label_problem(values["label"])

    def label_problem(self, label: Any) -> str:
        """Why a label cannot be used, or ""."""
        raise NotImplementedError

    def encode(
        self, rows: Sequence[TaskRow], tokenizer: Any, config: Any, length: int
    ) -> list[Any]:
        from loftq.tasks.kinds.batches import inputs_of

        columns = [[row.values[name] for row in rows] for name in self.texts]
        found = tokenizer(*columns, truncation=True, max_length=length)
        labels = [self.label(row) for row in rows]
        return [{**inputs_of(tokenizer, found, i), "labels": labels[i]} for i in range(len(rows))]

    def label(self, row: TaskRow) -> int | float:
        """What the head is to give for a row."""
        raise NotImplementedError

    def collate(self, features: Sequence[Mapping[str, Any]], tokenizer: Any) -> dict[str, Any]:
        import torch

        labels = torch.tensor([feature["labels"] for feature in features])
        return {**self.inputs(features, tokenizer), "labels": labels}

    def inputs(self, features: Sequence[Mapping[str, Any]], tokenizer: Any) -> dict[str, Any]:
        """A padded batch of features without their labels."""
        from loftq.tasks.kinds.batches import pad_inputs

        return pad_inputs(features, tokenizer)

    def predict(
        self, model: Any, tokenizer: Any, rows: Sequence[TaskRow], reading: Reading
    ) -> list[Any]:
        from loftq.tasks.kinds.batches import in_batches, on_device, scoring

        length = reading_length(self, tokenizer, model.config, reading.max_length)
        features = self.encode(rows, tokenizer, model.config, length)

        def run(batch: Sequence[Mapping[str, Any]]) -> list[list[float]]:
            logits = model(**on_device(self.inputs(batch, tokenizer), model)).logits
            found: list[list[float]] = logits.float().cpu().tolist()
            return found

        with scoring(model):
            found = in_batches(features, reading.batch_size, run, reading.on_batch)
        return [self.decide(logits) for logits in found]

    def decide(self, logits: list[float]) -> Any:
        """The prediction that the head's output stands for."""
        raise NotImplementedError

    def score(
        self, predictions: Sequence[Any], rows: Sequence[TaskRow], *, intervals: bool = True
    ) -> dict[str, Score]:
        from loftq.tasks.metrics import score

        references = [self.label(row) for row in rows]
        chosen = [self.value(prediction) for prediction in predictions]
        return score(self.metrics, chosen, references, task=self.name, intervals=intervals)

    def refuse_undefined(self, rows: Sequence[TaskRow]) -> None:
        from loftq.tasks.metrics import refuse_undefined

        refuse_undefined(self.metrics, [self.label(row) for row in rows], task=self.name)

    def value(self, prediction: Any) -> int | float:
        """The class or number of a prediction."""
        raise NotImplementedError


@dataclass(frozen=True, kw_only=True)
class Probabilities(_Labelled):
    """One of several classes. A prediction holds its index and the probabilities of all."""

    def decide(self, logits: list[float]) -> dict[str, Any]:
        most = max(logits)
        powers = [math.exp(logit - most) for logit in logits]
        shares = [round(power / sum(powers), 6) for power in powers]
        return {"label": logits.index(most), "probabilities": shares}

    def value(self, prediction: Any) -> int:
        return int(prediction["label"])


@dataclass(frozen=True, kw_only=True)
class Classification(Probabilities):
    """A class: `label` is its index."""

    labels: tuple[str, ...]
    """Names of the classes, by index."""
    kind: ClassVar[str] = "classification"

    def head_options(self) -> dict[str, Any]:
        names = dict(enumerate(self.labels))
        return {
            "num_labels": len(self.labels),
            "id2label": names,
            "label2id": {name: i for i, name in names.items()},
            "problem_type": "single_label_classification",
        }

    def label_problem(self, label: Any) -> str:
        most, whole = len(self.labels) - 1, isinstance(label, int) and not isinstance(label, bool)
        if whole and 0 <= label <= most:
            return ""
        hidden = " -1 is the mark of a split whose labels are not public." if label == -1 else ""
        return f"label is {label!r}; expected 0 to {most} ({', '.join(self.labels)}).{hidden}"

    def label(self, row: TaskRow) -> int:
        return int(row.values["label"])

    def example(self, row: TaskRow, prediction: Any | None = None) -> tuple[str, str]:
        index = self.label(row) if prediction is None else self.value(prediction)
        return _shown(self.texts, row), self.labels[index]


@dataclass(frozen=True, kw_only=True)
class Regression(_Labelled):
    """A number: `label` within `span`."""

    span: tuple[float, float]
    kind: ClassVar[str] = "regression"
    predicts_probabilities: ClassVar[bool] = False

    def head_options(self) -> dict[str, Any]:
        return {"num_labels": 1, "problem_type": "regression"}

    def label_problem(self, label: Any) -> str:
        low, high = self.span
        number = isinstance(label, int | float) and not isinstance(label, bool)
        if number and low <= label <= high:
            return ""
        hidden = " -1 is the mark of a split whose labels are not public." if label == -1 else ""
        return f"label is {label!r}; expected a number from {low:g} to {high:g}.{hidden}"

    def label(self, row: TaskRow) -> float:
        return float(row.values["label"])

    def decide(self, logits: list[float]) -> float:
        return logits[0]

    def value(self, prediction: Any) -> float:
        return float(prediction)

    def example(self, row: TaskRow, prediction: Any | None = None) -> tuple[str, str]:
        number = self.label(row) if prediction is None else self.value(prediction)
        return _shown(self.texts, row), f"{number:.2f}"


def _shown(names: Sequence[str], row: TaskRow) -> str:
    return "\n".join(f"{name}: {row.values[name]}" for name in names)
