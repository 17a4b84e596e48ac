"""Word problems whose answer is reasoned out and ends with a number: GSM8K."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from loftq.tasks.base import Reading, Task, TaskError, TaskRow

if TYPE_CHECKING:
    from loftq.tasks.scores import Score

PROMPT = "Question: {question}\nAnswer:"
ANSWER = re.compile(r"#### (-?[0-9.,]+)")
"""The final number, as the authors of GSM8K extract it; commas are then dropped."""


@dataclass(frozen=True, kw_only=True)
class Reasoning(Task):
    """A row has `question` and `answer`: the reasoning, then a line with #### and the number."""

    columns: tuple[str, ...] = ("question", "answer")
    generates: bool = True
    """Whether answers are generated and compared; else only their loss is reported."""
    answer_tokens: int = 256
    """Most tokens of a generated answer."""
    kind: ClassVar[str] = "reasoning"

    @property
    def metric_names(self) -> tuple[str, ...]:
        return ("exact_match", "answer_loss") if self.generates else ("answer_loss",)

    def auto_class(self, config: Any) -> str:
        return "AutoModelForCausalLM"

    def problem(self, values: Mapping[str, Any]) -> str:
        bad = next((name for name in self.columns if not isinstance(values[name], str)), None)
        if bad is not None:
            return f"{bad} is {values[bad]!r}; expected text."
        if final_number(values["answer"]) is None:
            return "answer holds no line `#### NUMBER`; expected the reasoning and then its result."
        return ""

    def encode(
        self, rows: Sequence[TaskRow], tokenizer: Any, config: Any, length: int
    ) -> list[Any]:
        from loftq.tasks.kinds.sequences import completion_ids, joined, prompt_ids

        found = []
        for row in rows:
            prompt = prompt_ids(tokenizer, _prompt(row))
            feature = joined(prompt, completion_ids(tokenizer, f" {row.values['answer']}"))
            if len(feature["input_ids"]) > length:
                raise TaskError(
                    f"{self.name}: {row.place}: {len(feature['input_ids'])} tokens, over "
                    f"max_length={length}. Choose a larger one; an answer cut short has no result."
                )
            found.append(feature)
        return found

    def collate(self, features: Sequence[Mapping[str, Any]], tokenizer: Any) -> dict[str, Any]:
        from loftq.tasks.kinds.sequences import collate_labelled

        return collate_labelled(features, tokenizer)

    def predict(
        self, model: Any, tokenizer: Any, rows: Sequence[TaskRow], reading: Reading
    ) -> list[Any]:
        """The generated text, and the loss of the given answer."""
        from loftq.tasks.kinds.sequences import label_losses
        from loftq.tasks.lengths import reading_length

        length = reading_length(self, tokenizer, model.config, reading.max_length)
        features = self.encode(rows, tokenizer, model.config, length)
        losses = label_losses(model, features, tokenizer, max(1, reading.batch_size // 4),
                              reading.on_batch)  # fmt: skip
        texts = self._texts(model, tokenizer, rows, reading) if self.generates else [""] * len(rows)
        return [
            {"text": text, "nats": nats, "tokens": tokens}
            for text, (nats, tokens) in zip(texts, losses, strict=True)
        ]

    def _texts(
        self, model: Any, tokenizer: Any, rows: Sequence[TaskRow], reading: Reading
    ) -> list[str]:
        from loftq.tasks.kinds.sequences import generate, prompt_ids

        return generate(
            model,
            tokenizer,
            [prompt_ids(tokenizer, _prompt(row)) for row in rows],
            tokens=reading.answer_tokens or self.answer_tokens,
            beams=reading.beams,
            batch_size=reading.batch_size,
            on_batch=reading.on_batch,
        )

    def answers(
        self, model: Any, tokenizer: Any, rows: Sequence[TaskRow], reading: Reading
    ) -> list[str]:
        return self._texts(model, tokenizer, rows, reading)

    def score(
        self, predictions: Sequence[Any], rows: Sequence[TaskRow], *, intervals: bool = True
    ) -> dict[str, Score]:
        from loftq.tasks.scores import mean, share

        tokens = [found["tokens"] for found in predictions]
        losses = [found["nats"] / found["tokens"] for found in predictions]
        scores = {"answer_loss": mean(losses, tokens)}
        if not self.generates:
            return scores
        pairs = zip(predictions, rows, strict=True)
        right = [
            final_number(found["text"]) == final_number(row.values["answer"])
            for found, row in pairs
        ]
        return {"exact_match": share(right), **scores}

    def example(self, row: TaskRow, prediction: Any | None = None) -> tuple[str, str]:
        text = row.values["answer"] if prediction is None else prediction["text"]
        return row.values["question"], str(text).strip()


def final_number(text: str) -> str | None:
    """The number after ####, without commas, or None."""
    found = ANSWER.search(text)
    return found[1].replace(",", "") if found else None


def _prompt(row: TaskRow) -> str:
    return PROMPT.format(question=row.values["question"])
