"""What a task is: data, splits, a head, a metric, and the settings that its paper used.

A task is an instance of one of the kinds (kinds/), made in a file of its own and listed in
table.py. Importing any of them is cheap: torch, transformers and the metric libraries are imported
by what uses them.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar

if TYPE_CHECKING:
    from loftq.tasks.scores import Score

ROLES = ("train", "validation", "test")


class TaskError(ValueError):
    """A task, its data or a model for it that cannot be used; says why and what to do."""


@dataclass(frozen=True, kw_only=True)
class Splits:
    """Which published splits play which role. Nothing is ever chosen by what `test` names.

    GLUE's test labels are not public, so that papers report its validation split. For such a task
    `test` names that split, and the checkpoint is chosen on rows held out of train.
    """

    train: tuple[str, ...]
    """Names of files or hub splits, joined in this order."""
    test: tuple[str, ...]
    """Each is scored by itself; the first one gives the headline."""
    validation: tuple[str, ...] = ()
    """() = held out of train."""
    by: str | None = None
    """Column whose values stay together when rows are held out, as the article of a question."""
    first: int | None = None
    """Train on the first so many values of `by`, test on the others: for data of one file."""


@dataclass(frozen=True, kw_only=True)
class TaskRow:
    """A checked row of a data set."""

    values: Mapping[str, Any]
    place: str
    """File or split, and the line."""


@dataclass(frozen=True, kw_only=True)
class Reading:
    """How a model is asked for predictions; a kind takes what concerns it."""

    batch_size: int = 32
    """Rows at a time."""
    max_length: int | None = None
    """Tokens of an encoded row; None = the task's default, at most what the model reads."""
    answer_tokens: int | None = None
    """Most tokens of a generated answer; None = the task's default."""
    beams: int = 1
    """Of a generated answer; 1 = greedy."""
    on_batch: Callable[[int, int], object] = field(default=lambda done, total: None)
    """Called with (rows done, rows in all)."""


@dataclass(frozen=True, kw_only=True)
class Task(ABC):
    """One task; the subclasses in kinds/ say how its rows become predictions and scores."""

    name: str
    title: str
    """For tables."""
    local: str
    """Path under LOFTQ_DATA: a folder with a file per split, or the stem of one file."""
    hub: str | None
    """Data set of the hub, ORG/NAME or ORG/NAME:CONFIGURATION; None = local files only."""
    splits: Splits
    columns: tuple[str, ...]
    """That every row must have."""
    primary: str
    """The metric that is the headline."""
    greater_is_better: bool = True
    """Of the primary metric."""
    files: Mapping[str, str] = field(default_factory=dict)
    """Split -> stem of its file, where it is not the split's name."""
    defaults: Mapping[str, Any] = field(default_factory=dict)
    """Fields of TrainConfig, and max_length: those of the paper."""
    paper: str = ""
    """Where the data comes from."""

    kind: ClassVar[str]
    """classification, regression, choice, spans, language, reasoning, summarization."""
    packages: ClassVar[tuple[str, ...]] = ()
    """That its metrics are taken from, beyond what loftq always has."""
    new_head: ClassVar[bool] = False
    """Whether the model gets a fresh head, which is trained in full beside the adapter."""
    encodes_rows: ClassVar[bool] = True
    """Whether features of a row depend on that row alone, so that rows may be encoded in parts."""
    predicts_probabilities: ClassVar[bool] = True
    """Whether the model gives probabilities (of classes, spans, tokens), which can be averaged."""
    selects_by_loss: ClassVar[bool] = True
    """Whether the best checkpoint has the lowest validation loss; else the best primary metric."""

    @property
    @abstractmethod
    def metric_names(self) -> tuple[str, ...]:
        """Keys of what `score` returns."""

    @abstractmethod
    def auto_class(self, config: Any) -> str:
        """Name of the transformers Auto class for a model of this `config` (PreTrainedConfig)."""

    def head_options(self) -> dict[str, Any]:
        """Options of from_pretrained that shape the head."""
        return {}

    @abstractmethod
    def problem(self, values: Mapping[str, Any]) -> str:
        """Why a row cannot be used (found, expected), or ""; the columns are there already."""

    def arrange(self, rows: list[TaskRow]) -> list[TaskRow]:
        """The rows of a split as this kind wants them; called once all are checked."""
        return rows

    @abstractmethod
    def encode(
        self, rows: Sequence[TaskRow], tokenizer: Any, config: Any, length: int
    ) -> list[Any]:
        """Features to train on: dicts of lists of int, `labels` among them.

        Args:
            rows: checked.
            tokenizer: of the model.
            config: of the model (PreTrainedConfig).
            length: most tokens of a feature.

        Raises:
            TaskError: rows that cannot be encoded in `length` tokens.
        """

    @abstractmethod
    def collate(self, features: Sequence[Mapping[str, Any]], tokenizer: Any) -> dict[str, Any]:
        """A padded batch of features, tensors by the model's argument names."""

    @abstractmethod
    def predict(
        self, model: Any, tokenizer: Any, rows: Sequence[TaskRow], reading: Reading
    ) -> list[Any]:
        """Predictions for the rows, JSON-ready: what `score` takes.

        One for each row, unless the kind scores a text as a whole. The model is on its device; its
        mode is kept.
        """

    def answers(
        self, model: Any, tokenizer: Any, rows: Sequence[TaskRow], reading: Reading
    ) -> list[str]:
        """What the model says to each row, for a person to read."""
        found = zip(rows, self.predict(model, tokenizer, rows, reading), strict=True)
        return [self.example(row, prediction)[1] for row, prediction in found]

    @abstractmethod
    def score(
        self, predictions: Sequence[Any], rows: Sequence[TaskRow], *, intervals: bool = True
    ) -> dict[str, Score]:
        """Metrics of predictions against the rows' references.

        Without `intervals` those that take long to find are left out (low = high = value).

        Raises:
            TaskError: a metric that these references leave undefined.
        """

    def refuse_undefined(self, rows: Sequence[TaskRow]) -> None:
        """Refuse references that leave a metric undefined, before anything takes time.

        Raises:
            TaskError: they do.
        """
        return  # most metrics are defined for any references

    @abstractmethod
    def example(self, row: TaskRow, prediction: Any | None = None) -> tuple[str, str]:
        """(prompt, answer) to show a person: the reference, or a prediction in the same form."""
