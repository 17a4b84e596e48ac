"""`loftq eval TASK`: a model or a run, scored on a task's reported splits."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from torch import nn

from loftq.checkpoint.durable import publish, write_partial
from loftq.integrations.causal import DTYPES
from loftq.integrations.device import check_device, default_device
from loftq.integrations.run_folder import tokenizer_home
from loftq.integrations.source import resolve_source
from loftq.tasks.base import Reading, Task, TaskError, TaskRow
from loftq.tasks.opening import headed_for, open_for_task, with_adapter, with_tokenizer
from loftq.tasks.sources import read_split, some
from loftq.tasks.table import find_task


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """Scores of one model on one task."""

    task: str
    model: str
    """As the user named it."""
    adapter: str
    """Name of its folder, or "none"."""
    metrics: Mapping[str, Mapping[str, Mapping[str, Any]]]
    """Split -> metric -> value, low, high, rows, interval."""
    primary: str
    dtype: str
    device: str
    predictions: Mapping[str, list[Any]]
    """Split -> what the model said, in the order of the rows."""

    @property
    def value(self) -> float:
        """The headline: the primary metric on the first split."""
        return float(next(iter(self.metrics.values()))[self.primary]["value"])

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready, without the predictions."""
        found = {name: value for name, value in asdict(self).items() if name != "predictions"}
        return {**found, "value": self.value}


def evaluate(
    path: str | Path,
    task: str | Task,
    *,
    split: str | None = None,
    data: str | Path | None = None,
    limit: int | None = None,
    device: str | None = None,
    dtype: str = "auto",
    batch_size: int = 32,
    max_length: int | None = None,
    answer_tokens: int | None = None,
    beams: int = 1,
    on_batch: Callable[[int, int], object] = lambda done, total: None,
) -> Evaluation:
    """Score a run of `train_task`, or a model that needs no new head for the task.

    Args:
        path: RUN of train, OUT of quantize (with its start adapter), folder of an ensemble, or a
            full-precision model.
        task: name of a row of TASKS, or a task of your own.
        split: published split to score; None = those that the task reports.
        data: folder laid out as LOFTQ_DATA; None = LOFTQ_DATA, else the hub.
        limit: score the first so many rows of a fixed shuffle; None = all.
        device: where to run; None = the GPU if there is one.
        dtype: auto (the run's, else as stored), float32, bfloat16 or float16.
        batch_size: rows at a time.
        max_length: tokens of a row; None = as in training, else the task's default.
        answer_tokens: most tokens of a generated answer; None = as in training, else the task's.
        beams: of a generated answer.
        on_batch: called with (rows done, rows in all), for each part of the work.

    Raises:
        TaskError: an unknown task, data that cannot be used, or a model without a head for it.
        ValueError: no such model.
    """
    chosen = find_task(task) if isinstance(task, str) else task
    _require(chosen)
    if dtype not in DTYPES:
        raise TaskError(f"dtype={dtype!r}: choose one of {', '.join(DTYPES)}.")
    where = device or default_device()
    check_device(where)
    names = chosen.splits.test if split is None else (split,)
    parts = {name: some(read_split(chosen, name, data=data), limit) for name in names}
    for rows in parts.values():
        chosen.refuse_undefined(rows)
    opened = open_for_task(path, chosen, dtype)
    opened.model.to(where).eval()
    reading = Reading(
        batch_size=batch_size,
        max_length=max_length or opened.settings.get("max_length"),
        answer_tokens=answer_tokens or opened.settings.get("answer_tokens"),
        beams=beams,
        on_batch=on_batch,
    )
    metrics, predictions = score_model(opened.model, opened.tokenizer, chosen, parts, reading)
    return Evaluation(
        task=chosen.name,
        model=str(path),
        adapter=opened.adapter,
        metrics=metrics,
        primary=chosen.primary,
        dtype=str(getattr(opened.model, "dtype", "")).removeprefix("torch."),
        device=where,
        predictions=predictions,
    )


def score_model(
    model: nn.Module,
    tokenizer: Any,
    task: Task,
    parts: Mapping[str, Sequence[TaskRow]],
    reading: Reading | None = None,
) -> tuple[dict[str, dict[str, dict[str, Any]]], dict[str, list[Any]]]:
    """Metrics and predictions of a loaded model in the class of the task.

    Args:
        model: on its device.
        tokenizer: of the model, with a pad token.
        task: whose rows these are.
        parts: split -> rows, from `sources.read_split`.
        reading: batch size, lengths; None = the defaults.

    Returns:
        Split -> metric -> value, low, high, rows, interval; and split -> predictions.
    """
    predictions = {
        name: task.predict(model, tokenizer, rows, reading or Reading())
        for name, rows in parts.items()
    }
    scores = {name: task.score(predictions[name], rows) for name, rows in parts.items()}
    metrics = {
        name: {metric: score.to_dict() for metric, score in found.items()}
        for name, found in scores.items()
    }
    return metrics, predictions


def load_task_model(
    path: str | Path, task: str | Task, *, adapter: str | Path | None = None, dtype: str = "auto"
) -> tuple[nn.Module, Any]:
    """A trained model in the class of its task, with its tokenizer.

    Args:
        path: a run of `train_task`, or the backbone of `adapter`.
        task: that it was trained on.
        adapter: folder of a trained adapter with its head; None = the run's own.
        dtype: auto (the run's, else as stored), float32, bfloat16 or float16.

    Raises:
        LineageError: the adapter belongs to another backbone.
        TaskError: a model without a head for the task.
    """
    chosen = find_task(task) if isinstance(task, str) else task
    if adapter is None:
        opened = open_for_task(path, chosen, dtype)
        return opened.model.eval(), opened.tokenizer
    folder, trained = resolve_source(path), Path(adapter)
    headed, _ = headed_for(folder, chosen, dtype)
    model = with_adapter(headed.model, trained, packed=True)
    found = with_tokenizer(model, tokenizer_home(folder, trained), trained.name, {})
    return found.model.eval(), found.tokenizer


def _require(task: Task) -> None:
    missing = [name for name in task.packages if importlib.util.find_spec(name) is None]
    if missing:
        raise TaskError(f"{task.name}: needs {' and '.join(missing)}. pip install 'loftq[eval]'.")


def write_predictions(predictions: Mapping[str, Sequence[Any]], folder: Path) -> list[Path]:
    """predictions-SPLIT.jsonl in `folder`: {"prediction": ...} a row, in the order of the split."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    for split, found in predictions.items():
        path = folder / f"predictions-{split}.jsonl"
        lines = [json.dumps({"prediction": row}, ensure_ascii=False) for row in found]
        write_partial(path, "".join(f"{line}\n" for line in lines).encode())
        publish(path)
        paths.append(path)
    return paths
