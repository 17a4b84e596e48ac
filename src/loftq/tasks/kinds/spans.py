"""Questions whose answer is a span of a text (SQuAD): start and end logits of each token."""

from __future__ import annotations

import re
import string
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from loftq.tasks.base import Reading, Task, TaskError, TaskRow
from loftq.tasks.lengths import reading_length

if TYPE_CHECKING:
    from loftq.tasks.scores import Score

STRIDE = 128
"""Tokens that a window of a long text shares with the next one."""
CANDIDATES = 20
"""Starts and ends that are combined."""
LONGEST = 30
"""Most tokens of an answer."""
ARTICLES = re.compile(r"\b(a|an|the)\b")


@dataclass(frozen=True, kw_only=True)
class Spans(Task):
    """A row has `question`, `context` and `answers` {text, answer_start}, one at least."""

    columns: tuple[str, ...] = ("question", "context", "answers")
    primary: str = "f1"
    kind: ClassVar[str] = "spans"
    new_head: ClassVar[bool] = True
    selects_by_loss: ClassVar[bool] = False

    @property
    def metric_names(self) -> tuple[str, ...]:
        return ("exact_match", "f1")

    def auto_class(self, config: Any) -> str:
        return "AutoModelForQuestionAnswering"

    def problem(self, values: Mapping[str, Any]) -> str:
        for name in ("question", "context"):
            if not isinstance(values[name], str) or not values[name].strip():
                return f"{name} is {values[name]!r}; expected text."
        answers = values["answers"]
        texts, starts = (
            (answers.get("text"), answers.get("answer_start"))
            if isinstance(answers, Mapping)
            else (None, None)
        )
        if not isinstance(texts, list) or not isinstance(starts, list) or len(texts) != len(starts):
            return "answers is not an object of two lists of equal length, text and answer_start."
        if not texts:
            return "answers is empty; expected an answer span (SQuAD v1.1 has one for each)."
        for text, start in zip(texts, starts, strict=True):
            if not isinstance(start, int) or values["context"][start : start + len(text)] != text:
                return f"no answer span: the context does not read {text!r} at {start!r}."
        return ""

    def encode(
        self, rows: Sequence[TaskRow], tokenizer: Any, config: Any, length: int
    ) -> list[Any]:
        """Windows of each row; where the first answer is not in a window, the span is its start."""
        found = []
        for window in self._windows(rows, tokenizer, length):
            row, offsets = rows[window["row"]], window["offsets"]
            answers = row.values["answers"]
            start = answers["answer_start"][0]
            first, last = _tokens(offsets, start, start + len(answers["text"][0]))
            labels = {"start_positions": first, "end_positions": last}
            found.append({**window["inputs"], **labels})
        return found

    def _windows(
        self, rows: Sequence[TaskRow], tokenizer: Any, length: int
    ) -> list[dict[str, Any]]:
        """Overlapping pieces: the question, then a part of the context with its characters."""
        from loftq.tasks.kinds.batches import inputs_of

        if not getattr(tokenizer, "is_fast", False):
            raise TaskError(f"{self.name}: needs a fast tokenizer (tokenizer.json), for offsets.")
        questions = [row.values["question"].strip() for row in rows]
        self._refuse_long(rows, questions, tokenizer, length)
        encoded = tokenizer(
            questions,
            [row.values["context"] for row in rows],
            truncation="only_second",
            max_length=length,
            stride=min(STRIDE, length // 4),
            return_overflowing_tokens=True,
            return_offsets_mapping=True,
        )
        found = []
        for i, row in enumerate(encoded["overflow_to_sample_mapping"]):
            parts = encoded.sequence_ids(i)
            offsets = [
                tuple(span) if part == 1 else None
                for span, part in zip(encoded["offset_mapping"][i], parts, strict=True)
            ]
            inputs = inputs_of(tokenizer, encoded, i)
            found.append({"row": row, "offsets": offsets, "inputs": inputs})
        return found

    def _refuse_long(
        self, rows: Sequence[TaskRow], questions: list[str], tokenizer: Any, length: int
    ) -> None:
        sizes = [len(ids) for ids in tokenizer(questions)["input_ids"]]
        room = length - length // 4 - 4  # for a part of the context beyond what windows share
        long = next((i for i, size in enumerate(sizes) if size > room), None)
        if long is not None:
            raise TaskError(
                f"{self.name}: {rows[long].place}: its question has {sizes[long]} tokens, which "
                f"leaves no room for the context in max_length={length}. Choose a larger one."
            )

    def collate(self, features: Sequence[Mapping[str, Any]], tokenizer: Any) -> dict[str, Any]:
        import torch

        from loftq.tasks.kinds.batches import pad_inputs

        found = pad_inputs(features, tokenizer)
        width = found["input_ids"].shape[1]
        left = tokenizer.padding_side == "left"
        for name in ("start_positions", "end_positions"):
            shift = [width - len(f["input_ids"]) if left else 0 for f in features]
            moved = [f[name] + by for f, by in zip(features, shift, strict=True)]
            found[name] = torch.tensor(moved)
        return found

    def predict(
        self, model: Any, tokenizer: Any, rows: Sequence[TaskRow], reading: Reading
    ) -> list[Any]:
        from loftq.tasks.kinds.batches import in_batches, on_device, pad_inputs, scoring

        length = reading_length(self, tokenizer, model.config, reading.max_length)
        windows = self._windows(rows, tokenizer, length)
        left = tokenizer.padding_side == "left"

        def run(batch: Sequence[Mapping[str, Any]]) -> list[tuple[list[float], list[float]]]:
            found = model(**on_device(pad_inputs(batch, tokenizer), model))
            pairs = zip(found.start_logits.tolist(), found.end_logits.tolist(), strict=True)
            sizes = [len(feature["input_ids"]) for feature in batch]
            cuts = [slice(-n, None) if left else slice(0, n) for n in sizes]
            return [(s[cut], e[cut]) for (s, e), cut in zip(pairs, cuts, strict=True)]

        with scoring(model):
            inputs = [window["inputs"] for window in windows]
            logits = in_batches(inputs, reading.batch_size, run, reading.on_batch)
        return self._best(rows, windows, logits)

    def _best(
        self,
        rows: Sequence[TaskRow],
        windows: Sequence[Mapping[str, Any]],
        logits: Sequence[tuple[list[float], list[float]]],
    ) -> list[str]:
        """The text of the best span over all windows of a row."""
        best: list[tuple[float, str]] = [(float("-inf"), "")] * len(rows)
        for window, (starts, ends) in zip(windows, logits, strict=True):
            i, offsets = window["row"], window["offsets"]
            context = rows[i].values["context"]
            for sum_, first, last in _spans(starts, ends, offsets):
                if sum_ > best[i][0]:
                    best[i] = (sum_, context[offsets[first][0] : offsets[last][1]])
        return [text for _, text in best]

    def score(
        self, predictions: Sequence[Any], rows: Sequence[TaskRow], *, intervals: bool = True
    ) -> dict[str, Score]:
        from loftq.tasks.scores import exactly, mean, share

        pairs = [
            (str(found), row.values["answers"]["text"])
            for found, row in zip(predictions, rows, strict=True)
        ]
        exact = [any(normalized(found) == normalized(t) for t in texts) for found, texts in pairs]
        f1 = [max(word_f1(found, t) for t in texts) for found, texts in pairs]
        overlap = mean(f1) if intervals else exactly(sum(f1) / len(f1), len(f1))
        return {"exact_match": share(exact), "f1": overlap}

    def example(self, row: TaskRow, prediction: Any | None = None) -> tuple[str, str]:
        text = row.values["answers"]["text"][0] if prediction is None else str(prediction)
        return f"{row.values['context']}\n\n{row.values['question'].strip()}", text


def normalized(text: str) -> str:
    """As SQuAD compares answers: lower case, without punctuation, articles and double spaces."""
    bare = "".join(letter for letter in text.lower() if letter not in string.punctuation)
    return " ".join(ARTICLES.sub(" ", bare).split())


def word_f1(found: str, wanted: str) -> float:
    """Harmonic mean of precision and recall over the words of two normalized answers."""
    ours, theirs = normalized(found).split(), normalized(wanted).split()
    common = sum((Counter(ours) & Counter(theirs)).values())
    return 2 * common / (len(ours) + len(theirs)) if common else 0.0


def _tokens(offsets: Sequence[tuple[int, int] | None], start: int, end: int) -> tuple[int, int]:
    """First and last token of the characters start..end; (0, 0) if they are not all here."""
    inside = [i for i, span in enumerate(offsets) if span and span[0] < end and span[1] > start]
    spans = [offsets[i] for i in inside]
    whole = spans and spans[0] and spans[-1] and spans[0][0] <= start and spans[-1][1] >= end
    return (inside[0], inside[-1]) if whole else (0, 0)


def _spans(
    starts: Sequence[float], ends: Sequence[float], offsets: Sequence[tuple[int, int] | None]
) -> list[tuple[float, int, int]]:
    """(sum of logits, first, last) of spans in the context that are not too long."""
    here = [i for i, span in enumerate(offsets) if span is not None]
    firsts = sorted(here, key=lambda i: starts[i], reverse=True)[:CANDIDATES]
    lasts = sorted(here, key=lambda i: ends[i], reverse=True)[:CANDIDATES]
    return [(starts[i] + ends[j], i, j) for i in firsts for j in lasts if i <= j < i + LONGEST]
