"""A question with several answers to choose from, each read together with what it is about.

The head gives every answer a number, and their softmax is the probability of each: a class among
as many as there are answers, so that metrics and predictions are those of a classification.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from loftq.tasks.base import TaskError, TaskRow
from loftq.tasks.kinds.classification import Probabilities


@dataclass(frozen=True, kw_only=True)
class Choice(Probabilities):
    """Columns: a text or a list of turns, a question, a list of answers, the right one's text."""

    context: str
    """Column of what the question is about."""
    question: str
    choices: str
    """Column of the answers to choose from."""
    answer: str
    """Column of the right answer, in its own words."""
    count: int
    """Answers of every row."""
    kind: ClassVar[str] = "choice"

    def auto_class(self, config: Any) -> str:
        return "AutoModelForMultipleChoice"

    def problem(self, values: Mapping[str, Any]) -> str:
        context, question = values[self.context], values[self.question]
        choices, answer = values[self.choices], values[self.answer]
        if not isinstance(context, str) and not _is_texts(context):
            return f"{self.context} is {context!r}; expected text, or a list of turns."
        if not isinstance(question, str):
            return f"{self.question} is {question!r}; expected text."
        if not _is_texts(choices) or len(choices) != self.count:
            return f"{self.choices} is {choices!r}; expected a list of {self.count} texts."
        if choices.count(answer) != 1:
            return f"{self.answer} is {answer!r}; expected one of {choices!r}."
        return ""

    def label(self, row: TaskRow) -> int:
        return int(row.values[self.choices].index(row.values[self.answer]))

    def encode(
        self, rows: Sequence[TaskRow], tokenizer: Any, config: Any, length: int
    ) -> list[Any]:
        """A feature holds its answers end to end, and how long each is; a long context is cut."""
        return [self._encoded(row, tokenizer, length) for row in rows]

    def _encoded(self, row: TaskRow, tokenizer: Any, length: int) -> dict[str, Any]:
        from loftq.tasks.kinds.batches import inputs_of

        asked = [f"{row.values[self.question]} {choice}" for choice in row.values[self.choices]]
        longest = max(len(tokenizer(text, verbose=False)["input_ids"]) for text in asked)
        if longest + 2 > length:
            raise TaskError(
                f"{self.name}: {row.place}: question and answer alone have {longest} tokens, which "
                f"leaves no room in max_length={length}. Choose a larger one."
            )
        contexts = [_text(row.values[self.context])] * self.count
        found = tokenizer(contexts, asked, truncation="only_first", max_length=length)
        pieces = [inputs_of(tokenizer, found, place) for place in range(self.count)]
        joined = {name: [x for piece in pieces for x in piece[name]] for name in pieces[0]}
        sizes = [len(piece["input_ids"]) for piece in pieces]
        return {**joined, "sizes": sizes, "labels": self.label(row)}

    def inputs(self, features: Sequence[Mapping[str, Any]], tokenizer: Any) -> dict[str, Any]:
        """(rows, answers, tokens)."""
        from loftq.tasks.kinds.batches import pad_inputs

        pieces = [piece for feature in features for piece in _pieces(feature)]
        padded = pad_inputs(pieces, tokenizer)
        return {name: value.view(len(features), self.count, -1) for name, value in padded.items()}

    def example(self, row: TaskRow, prediction: Any | None = None) -> tuple[str, str]:
        choices = row.values[self.choices]
        index = self.label(row) if prediction is None else self.value(prediction)
        listed = "\n".join(f"- {choice}" for choice in choices)
        asked = row.values[self.question]
        return f"{_text(row.values[self.context])}\n{asked}\n{listed}", choices[index]


def _pieces(feature: Mapping[str, Any]) -> list[dict[str, Any]]:
    """One feature for each answer."""
    names = [name for name in feature if name not in ("sizes", "labels")]
    found, begin = [], 0
    for size in feature["sizes"]:
        found.append({name: feature[name][begin : begin + size] for name in names})
        begin += size
    return found


def _is_texts(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(isinstance(x, str) for x in value)


def _text(context: str | list[str]) -> str:
    return context if isinstance(context, str) else "\n".join(context)
