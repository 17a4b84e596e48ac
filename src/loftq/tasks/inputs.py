"""What goes into a run on a task: tokenizer, checked rows, features."""

from __future__ import annotations

import hashlib
from array import array
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from loftq.integrations.discover import load_config, load_tokenizer
from loftq.integrations.heads import require_class
from loftq.tasks.base import Task, TaskRow
from loftq.tasks.config import TaskConfig
from loftq.tasks.lengths import reading_length
from loftq.tasks.sources import TaskData, read_for_training, read_split, some
from loftq.train.data import DataCounts, HeldOut, Prepared, RenderedExample
from loftq.train.data.show import rendered
from loftq.train.padding import IGNORED

PART = 2000
"""Rows that are encoded at once."""


@dataclass(frozen=True, kw_only=True)
class TaskInputs:
    """Rows and features of a run."""

    task: Task
    tokenizer: Any
    config: Any
    """Of the model (PreTrainedConfig)."""
    data: TaskData
    test: Mapping[str, list[TaskRow]]
    """Rows of each reported split."""
    train: list[Any]
    """Features."""
    validation: list[Any]
    """Features of the rows held out."""
    length: int
    """Most tokens of a feature."""

    @cached_property
    def digest(self) -> str:
        """sha256 of all features, of training and validation, in their order."""
        found = hashlib.sha256()
        for feature in (*self.train, *self.validation):
            found.update(repr(sorted(feature.items())).encode())
        return found.hexdigest()

    def shown(self, samples: int) -> Prepared:
        """The same in the words of a run on a user's own data, for its records and the screen."""
        found, held = self.train[0], self.data.validation[:samples]
        return Prepared(
            train=self.train,
            validation=self.validation,
            kind=self.task.kind,
            counts=self._counts(),
            example=_rendered(self.task, self.tokenizer, found, self.data.train[0]),
            prompts=tuple(HeldOut((), *self.task.example(row)) for row in held),
            notes=self.data.notes,
        )

    def _counts(self) -> DataCounts:
        data, sizes = self.data, [len(f["input_ids"]) for f in self.train]
        held = [len(f["input_ids"]) for f in self.validation]
        longest = [_longest(feature) for feature in (*self.train, *self.validation)]
        return DataCounts(
            format=self.task.kind,
            source=data.source,
            validation_source=None,
            rows=len(data.train) + len(data.validation),
            trained_rows=len(self.train),
            held_out_rows=len(self.validation),
            tokens=sum(sizes),
            trained_tokens=_learnt(self.train),
            held_out_tokens=sum(held),
            held_out_trained_tokens=_learnt(self.validation),
            truncated=sum(size >= self.length for size in longest),
            dropped=0,
            skipped=data.skipped,
            duplicates=0,
            max_length=self.length,
        )


def read_task_inputs(
    task: Task, folder: Path, chosen: TaskConfig, data: str | None, *, tokenizer: Path | None = None
) -> TaskInputs:
    """Tokenizer, rows and features for the model in `folder`; all that can be wrong is said here.

    Args:
        task: what is learnt.
        folder: with config.json.
        chosen: rows and lengths.
        data: as in `sources.read_split`.
        tokenizer: folder of the tokenizer, if it is another one.

    Raises:
        TaskError: data that is missing or cannot be used, a length that the model cannot read, a
            metric that the references leave undefined.
        HeadError: transformers has no class for this model that does the task.
        SourceError: no tokenizer.
    """
    words, config = load_tokenizer(tokenizer or folder), load_config(folder)
    if words.pad_token is None:
        words.pad_token = words.eos_token
    require_class(folder, task.auto_class(config))
    length = reading_length(task, words, config, chosen.max_length)
    rows = read_for_training(
        task,
        data=data,
        rows=chosen.train_rows,
        holdout=chosen.holdout,
        validation_rows=chosen.validation_rows,
        on_bad_rows=chosen.on_bad_rows,
    )
    test = {
        name: some(read_split(task, name, data=data), chosen.eval_rows) for name in task.splits.test
    }
    for part in test.values():
        task.refuse_undefined(part)
    if not task.selects_by_loss:
        task.refuse_undefined(rows.validation)
    return TaskInputs(
        task=task,
        tokenizer=words,
        config=config,
        data=rows,
        test=test,
        train=_encoded(task, rows.train, words, config, length),
        validation=_encoded(task, rows.validation, words, config, length),
        length=length,
    )


def _encoded(
    task: Task, rows: Sequence[TaskRow], tokenizer: Any, config: Any, length: int
) -> list[dict[str, Any]]:
    """Features with their tokens at 4 bytes each: lists of Python's integers take ten times that,
    gigabytes for the larger data sets."""
    part = PART if task.encodes_rows else max(1, len(rows))
    return [
        {k: array("i", v) if isinstance(v, list) else v for k, v in feature.items()}
        for start in range(0, len(rows), part)
        for feature in task.encode(rows[start : start + part], tokenizer, config, length)
    ]


def _longest(feature: Mapping[str, Any]) -> int:
    """Tokens that the model reads at once; a feature of several pieces says how long each is."""
    return max(feature.get("sizes", [len(feature["input_ids"])]))


def _learnt(features: Sequence[Mapping[str, Any]]) -> int:
    """Tokens with a loss of their own; one for each row whose label is not a sequence."""
    found = [feature.get("labels") for feature in features]
    return sum(
        sum(token != IGNORED for token in labels) if isinstance(labels, array) else 1
        for labels in found
    )


def _rendered(
    task: Task, tokenizer: Any, feature: Mapping[str, Any], row: TaskRow
) -> RenderedExample:
    labels = feature.get("labels")
    if isinstance(labels, array) and len(labels) == len(feature["input_ids"]):
        mask = [int(token != IGNORED) for token in labels]
        return rendered(tokenizer, feature["input_ids"], mask)
    prompt, answer = task.example(row)
    return RenderedExample(((f"{prompt}\n", False), (answer, True)))
