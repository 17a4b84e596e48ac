"""Documents and their summaries, by an encoder-decoder or by a decoder alone; ROUGE."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from loftq.tasks.base import Reading, Task, TaskError, TaskRow
from loftq.tasks.lengths import reading_length

if TYPE_CHECKING:
    from loftq.tasks.scores import Score

ROUGE = ("rouge1", "rouge2", "rougeL", "rougeLsum")
SOURCE_PREFIX = {"t5": "summarize: ", "mt5": "summarize: "}
"""Written before a document, by model_type: T5 was taught its tasks so."""
CUE = "\nTL;DR:"
"""Between document and summary for a decoder alone."""
LEAST = 16
"""Tokens of a document that must be left when it is cut for a decoder."""


@dataclass(frozen=True, kw_only=True)
class Summarization(Task):
    """A row has a document and one summary or several, in the columns named."""

    document: str
    """Column of the text."""
    summary: str
    """Column of the summary: text, or a list of texts that count alike."""
    columns: tuple[str, ...] = ()
    primary: str = "rougeL"
    answer_tokens: int = 128
    """Most tokens of a generated summary, and of a summary that is learnt by an encoder-decoder."""
    packages: ClassVar[tuple[str, ...]] = ("rouge_score",)
    kind: ClassVar[str] = "summarization"

    def __post_init__(self) -> None:
        object.__setattr__(self, "columns", (self.document, self.summary))

    @property
    def metric_names(self) -> tuple[str, ...]:
        return ROUGE

    def auto_class(self, config: Any) -> str:
        both = getattr(config, "is_encoder_decoder", False)
        return "AutoModelForSeq2SeqLM" if both else "AutoModelForCausalLM"

    def problem(self, values: Mapping[str, Any]) -> str:
        text = values[self.document]
        if not isinstance(text, str) or not text.strip():
            return f"{self.document} is {text!r}; expected text."
        found = _summaries(values[self.summary])
        if not found or not all(isinstance(one, str) and one.strip() for one in found):
            return f"{self.summary} is {values[self.summary]!r}; expected a summary, or several."
        return ""

    def encode(
        self, rows: Sequence[TaskRow], tokenizer: Any, config: Any, length: int
    ) -> list[Any]:
        """A document is cut at its end to fit; the first summary is learnt, whole."""
        if getattr(config, "is_encoder_decoder", False):
            return self._pairs(rows, tokenizer, config, length)
        from loftq.tasks.kinds.sequences import completion_ids, joined

        found = []
        for row in rows:
            summary = completion_ids(tokenizer, f" {_summaries(row.values[self.summary])[0]}")
            prompt = self._prompt(row, tokenizer, length - len(summary))
            found.append(joined(prompt, summary))
        return found

    def _pairs(
        self, rows: Sequence[TaskRow], tokenizer: Any, config: Any, length: int
    ) -> list[Any]:
        from loftq.tasks.kinds.batches import inputs_of

        sources = tokenizer(self._sources(rows, config), truncation=True, max_length=length)
        targets = tokenizer(
            text_target=[_summaries(row.values[self.summary])[0] for row in rows],
            truncation=True,
            max_length=min(self.answer_tokens, length),
        )["input_ids"]
        return [
            {**inputs_of(tokenizer, sources, i), "labels": list(targets[i])}
            for i in range(len(rows))
        ]

    def _sources(self, rows: Sequence[TaskRow], config: Any) -> list[str]:
        prefix = SOURCE_PREFIX.get(config.model_type, "")
        return [f"{prefix}{row.values[self.document]}" for row in rows]

    def _prompt(self, row: TaskRow, tokenizer: Any, room: int) -> list[int]:
        """Tokens of the document, cut to leave room for the cue, and of the cue."""
        from loftq.tasks.kinds.sequences import prompt_ids

        cue = tokenizer(CUE, add_special_tokens=False)["input_ids"]
        if room - len(cue) < LEAST:
            raise TaskError(
                f"{self.name}: {row.place}: its summary leaves no room for the document. Choose a "
                "larger max_length."
            )
        text = prompt_ids(tokenizer, row.values[self.document])
        return [*text[: room - len(cue)], *cue]

    def collate(self, features: Sequence[Mapping[str, Any]], tokenizer: Any) -> dict[str, Any]:
        from loftq.tasks.kinds.sequences import collate_labelled

        return collate_labelled(features, tokenizer)

    def predict(
        self, model: Any, tokenizer: Any, rows: Sequence[TaskRow], reading: Reading
    ) -> list[Any]:
        from loftq.tasks.kinds.sequences import generate

        config = model.config
        length = reading_length(self, tokenizer, config, reading.max_length)
        tokens = reading.answer_tokens or self.answer_tokens
        if getattr(config, "is_encoder_decoder", False):
            sources = self._sources(rows, config)
            inputs = tokenizer(sources, truncation=True, max_length=length)["input_ids"]
        else:
            inputs = [self._prompt(row, tokenizer, length - tokens) for row in rows]
        texts = generate(
            model,
            tokenizer,
            inputs,
            tokens=tokens,
            beams=reading.beams,
            batch_size=reading.batch_size,
            on_batch=reading.on_batch,
        )
        return [text.strip() for text in texts]

    def score(
        self, predictions: Sequence[Any], rows: Sequence[TaskRow], *, intervals: bool = True
    ) -> dict[str, Score]:
        """F-measures with stemming; of several summaries the best match counts."""
        from rouge_score.rouge_scorer import RougeScorer

        from loftq.tasks.scores import exactly, mean

        scorer = RougeScorer(ROUGE, use_stemmer=True)
        found = [
            scorer.score_multi(_summaries(row.values[self.summary]), str(text))
            for text, row in zip(predictions, rows, strict=True)
        ]
        values = {name: [row[name].fmeasure for row in found] for name in ROUGE}
        if not intervals:
            return {name: exactly(sum(v) / len(v), len(v)) for name, v in values.items()}
        return {name: mean(v) for name, v in values.items()}

    def example(self, row: TaskRow, prediction: Any | None = None) -> tuple[str, str]:
        first = _summaries(row.values[self.summary])[0]
        return row.values[self.document], first if prediction is None else str(prediction)


def _summaries(value: Any) -> list[str]:
    return list(value) if isinstance(value, list | tuple) else [value]
