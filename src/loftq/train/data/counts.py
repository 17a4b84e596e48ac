"""What was read and what became of it."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any


@dataclass
class Tally:
    """What became of the samples of one source, counted while they are encoded."""

    truncated: int = 0
    """Cut at max_length."""
    dropped: int = 0
    """Longer than max_length, or without a trained token once cut."""
    split: int = 0
    """Documents that became several sequences."""
    longest: int = 0
    """Tokens of the longest sample."""
    rewritten: int = 0
    """Answers that the chat template changes once others follow: not trained."""
    ended: int = 0
    """Chats whose template marks no end of an answer: the end-of-text token was added."""

    def notes(self, name: str, max_length: int) -> list[str]:
        """What a person should know of it, one sentence each."""
        over = f"longer than max_length={max_length} tokens (the longest has {self.longest})"
        sentences = (
            (self.dropped, f"samples {over} and left out; truncation=cut keeps their beginning"),
            (self.truncated, f"samples {over} and cut at their end"),
            (self.split, f"texts {over} and split, nothing left out"),
            (
                self.rewritten,
                "earlier answers not trained: the chat template writes them differently once "
                "another turn follows (reasoning is left out)",
            ),
            (
                self.ended,
                "chats ended with the end-of-text token: the chat template puts no special token "
                "after an answer, so that the model would not learn to stop",
            ),
        )
        return [f"{name}: {count} {sentence}" for count, sentence in sentences if count]


@dataclass(frozen=True, kw_only=True)
class DataCounts:
    """data.json of a run. Sums over training and validation data are marked (both)."""

    format: str
    """Name of the rows' format."""
    source: str
    """The training data, as the user named it."""
    validation_source: str | None
    """The validation data; None = held out of the training data."""
    rows: int
    """Rows read, those that cannot be used included (both)."""
    trained_rows: int
    """Sequences to train on."""
    held_out_rows: int
    """Sequences to validate on."""
    tokens: int
    """Tokens of the training sequences."""
    trained_tokens: int
    """Those of them that the loss is computed on."""
    held_out_tokens: int
    """Tokens of the validation sequences."""
    held_out_trained_tokens: int
    """Those of them that the validation loss is computed on."""
    truncated: int
    """Samples cut at max_length (both)."""
    dropped: int
    """Samples left out because they are longer than max_length (both)."""
    skipped: int
    """Rows left out because they cannot be used, with on_bad_rows=skip (both)."""
    duplicates: int
    """Validation sequences that are training sequences too."""
    max_length: int
    """Tokens of a sequence at most."""

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready."""
        return asdict(self)
