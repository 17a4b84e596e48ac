"""A text to be continued: blocks to train on, three perplexities to report (eval/protocols.py)."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from loftq.tasks.base import Reading, Task, TaskError, TaskRow
from loftq.tasks.lengths import UNLIMITED

if TYPE_CHECKING:
    from loftq.tasks.scores import Score

HEADING = re.compile(r" = [^=].*[^=] = \n")
"""A line of WikiText that begins an article."""
SHOWN = 48
"""Tokens of an article that a sample continues, and tokens of the continuation."""


@dataclass(frozen=True, kw_only=True)
class Language(Task):
    """Rows are articles: `lines`, as the data set stores them."""

    columns: tuple[str, ...] = ("text",)
    protocols: tuple[str, ...] = ("gptq", "paper", "word")
    """The first one gives the headline."""
    greater_is_better: bool = False
    kind: ClassVar[str] = "language"
    encodes_rows: ClassVar[bool] = False

    @property
    def metric_names(self) -> tuple[str, ...]:
        return tuple(f"perplexity_{name}" for name in self.protocols)

    def auto_class(self, config: Any) -> str:
        return "AutoModelForCausalLM"

    def problem(self, values: Mapping[str, Any]) -> str:
        text = values["text"]
        return "" if isinstance(text, str) else f"text is {text!r}; expected text."

    def arrange(self, rows: list[TaskRow]) -> list[TaskRow]:
        """Lines joined to articles, so that what is held out is a whole text.

        Blank lines before the first heading belong to its article.
        """
        found: list[tuple[str, list[str]]] = []
        for row in rows:
            line = row.values["text"]
            begun = bool(found) and any(text.strip() for text in found[-1][1])
            if not found or (begun and HEADING.fullmatch(line)):
                found.append((row.place, []))
            found[-1][1].append(line)
        return [TaskRow(values={"lines": lines}, place=place) for place, lines in found]

    def encode(
        self, rows: Sequence[TaskRow], tokenizer: Any, config: Any, length: int
    ) -> list[Any]:
        """Blocks of `length` tokens of the lines encoded one by one; a remainder is left out."""
        lines = [line for row in rows for line in row.values["lines"]]
        encoded = tokenizer(lines, verbose=False)["input_ids"]
        stream = [token for ids in encoded for token in ids]
        blocks = [stream[i : i + length] for i in range(0, len(stream) - length + 1, length)]
        if not blocks:
            raise TaskError(
                f"{self.name}: {len(rows)} articles of {len(stream)} tokens give no block of "
                f"{length}. Take more rows, or a smaller max_length."
            )
        return [{"input_ids": block, "labels": list(block)} for block in blocks]

    def collate(self, features: Sequence[Mapping[str, Any]], tokenizer: Any) -> dict[str, Any]:
        from loftq.tasks.kinds.sequences import collate_labelled

        return collate_labelled(features, tokenizer)

    def predict(
        self, model: Any, tokenizer: Any, rows: Sequence[TaskRow], reading: Reading
    ) -> list[Any]:
        """A result of each protocol: nats of each window, and what their sum is divided by.

        Windows are the protocol's, or as long as the model reads if that is less; `context` says.
        """
        from loftq.eval.perplexity import longest
        from loftq.eval.protocols import PROTOCOLS, protocol_perplexity
        from loftq.tasks.kinds.batches import scoring

        lines = [line for row in rows for line in row.values["lines"]]
        found = []
        with scoring(model):
            for name in self.protocols:
                result = protocol_perplexity(
                    model,
                    tokenizer,
                    lines,
                    name,
                    context=min(PROTOCOLS[name].context, longest(model) or UNLIMITED),
                    batch=max(1, reading.batch_size // 8),
                    on_window=lambda done, total, _: reading.on_batch(done, total),
                )
                found.append({**result.to_dict(), "windows": list(result.windows)})
        return found

    def answers(
        self, model: Any, tokenizer: Any, rows: Sequence[TaskRow], reading: Reading
    ) -> list[str]:
        from loftq.tasks.kinds.sequences import generate

        heads = [tokenizer(self._text(row), verbose=False)["input_ids"][:SHOWN] for row in rows]
        return generate(
            model,
            tokenizer,
            heads,
            tokens=reading.answer_tokens or SHOWN,
            beams=reading.beams,
            batch_size=reading.batch_size,
            on_batch=reading.on_batch,
        )

    def score(
        self, predictions: Sequence[Any], rows: Sequence[TaskRow], *, intervals: bool = True
    ) -> dict[str, Score]:
        import numpy as np

        from loftq.tasks.scores import bootstrapped, exactly

        found = {}
        for result in predictions:
            windows = np.asarray(result["windows"], dtype=np.float64)
            each = result["units"] / len(windows)

            def of(chosen: Any, windows: Any = windows, each: float = each) -> float:
                return _exp(float(windows[chosen].mean()) / each)

            name = f"perplexity_{result['protocol']}"
            value = _exp(float(windows.sum()) / result["units"])
            found[name] = (
                bootstrapped(of, len(windows)) if intervals else exactly(value, len(windows))
            )
        return found

    def example(self, row: TaskRow, prediction: Any | None = None) -> tuple[str, str]:
        """The first line with words, and what follows."""
        text = self._text(row).strip()
        head, _, rest = text.partition("\n")
        return head, rest.strip()[:300] if prediction is None else str(prediction)

    def _text(self, row: TaskRow) -> str:
        return "".join(row.values["lines"])


def _exp(nll: float) -> float:
    return math.exp(nll) if nll < 700 else math.inf
