"""What a user may choose about training data."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields

from loftq.train.data.formats import FORMATS
from loftq.train.data.problems import DataError

SETTINGS_VERSION = 1
DEFAULT_LENGTH = 1024
"""Tokens of a sample at most, unless told otherwise."""
SHORTEST = 8
"""A sample of fewer tokens than this holds no question with its answer."""
TRUNCATIONS = ("drop", "cut")
ON_BAD_ROWS = ("error", "skip")


@dataclass(frozen=True, kw_only=True)
class DataSettings:
    """Every choice about the rows of `loftq train`."""

    max_length: int | None = None
    """Tokens of a sample at most; None = the model's context, but no more than 1024."""
    holdout: float = 0.05
    """Share of the samples held out for validation where no validation data is given."""
    completion_only: bool | None = None
    """Train on answers only; None = yes for chats and prompt/completion, no for plain text."""
    data_format: str | None = None
    """messages, sharegpt, alpaca, prompt-completion, text or preference; None = detected."""
    chat_template: str | None = None
    """Name of a built-in template or a .jinja file; replaces the tokenizer's own."""
    truncation: str = "drop"
    """What becomes of a sample over max_length: dropped whole, or cut at its end."""
    on_bad_rows: str = "error"
    """Rows that cannot be used: stop with a list of them, or skip and count them."""
    seed: int = 0
    """Of the choice of held-out samples."""
    limit: int | None = None
    """Read so many rows from the start; None = all."""

    def __post_init__(self) -> None:
        problem = self._check_numbers() or self._check_names()
        if problem:
            raise DataError(problem)

    def _check_numbers(self) -> str:
        if self.max_length is not None and self.max_length < SHORTEST:
            return f"max_length={self.max_length}: must be at least {SHORTEST} tokens."
        if not 0 < self.holdout < 1:
            return (
                f"holdout={self.holdout:g}: must lie between 0 and 1. Without held-out samples "
                "nothing shows when training begins to learn the data by heart; 0.01 is enough "
                "for large data, or give validation data of your own."
            )
        if self.limit is not None and self.limit < 1:
            return f"limit={self.limit}: must be at least 1 row; leave it out to read all."
        return ""

    def _check_names(self) -> str:
        for key, value, known in (
            ("data_format", self.data_format, tuple(FORMATS)),
            ("truncation", self.truncation, TRUNCATIONS),
            ("on_bad_rows", self.on_bad_rows, ON_BAD_ROWS),
        ):
            if value is not None and value not in known:
                return f"{key}={value!r} does not exist; choose one of {', '.join(known)}."
        return ""

    def to_dict(self) -> dict[str, object]:
        """JSON-ready, with a version."""
        return {"version": SETTINGS_VERSION, **asdict(self)}

    @classmethod
    def from_dict(cls, values: Mapping[str, object]) -> DataSettings:
        """Inverse of to_dict.

        Raises:
            DataError: a version or key that this release does not know, or a value out of range.
        """
        values = dict(values)
        version = values.pop("version", SETTINGS_VERSION)
        if version != SETTINGS_VERSION:
            raise DataError(f"data settings version {version} is not {SETTINGS_VERSION}: update.")
        known = [f.name for f in fields(cls)]
        unknown = sorted(set(values) - set(known))
        if unknown:
            raise DataError(f"unknown data option {unknown[0]!r}. Known: {', '.join(known)}.")
        return cls(**values)  # type: ignore[arg-type]
