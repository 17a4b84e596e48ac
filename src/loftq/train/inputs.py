"""What goes into a run: tokenizer and rows; and that they are those it began with."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from loftq.train.data import DataSettings, Prepared, prepare
from loftq.train.errors import TrainError
from loftq.train.place import Place
from loftq.train.samples import stop_tokens

WATCHED_ROWS = 200  # rows in which the mark that ends an answer is looked for


@dataclass(frozen=True, kw_only=True)
class Inputs:
    """Rows ready for a trainer, and what made them."""

    tokenizer: Any
    prepared: Prepared

    @cached_property
    def digest(self) -> str:
        """sha256 of all rows, of training and validation, in their order."""
        found = hashlib.sha256()
        for rows in (self.prepared.train, self.prepared.validation):
            for batch in rows.iter(1000):
                found.update(repr(sorted(batch.items())).encode())
        return found.hexdigest()

    @cached_property
    def stop(self) -> list[int]:
        """Ids that end an answer."""
        if self.prepared.kind != "sft":
            return stop_tokens(self.tokenizer, [])
        rows = self.prepared.train
        first = rows.select(range(min(WATCHED_ROWS, len(rows))))
        return stop_tokens(self.tokenizer, map(_trained_part, first))


def read_inputs(
    folder: Path,
    data: str,
    validation: str | None,
    settings: DataSettings,
    place: Place,
    *,
    tokenizer: Path | None = None,
) -> Inputs:
    """Tokenizer and rows, for the model in `folder`; a `tokenizer` elsewhere takes precedence.

    Raises:
        DataError: rows that cannot be used.
        TrainError: no tokenizer.
    """
    from transformers import AutoConfig, AutoTokenizer

    source = tokenizer or folder
    try:
        loaded = AutoTokenizer.from_pretrained(source)
    except (OSError, ValueError) as error:
        raise TrainError(
            f"{source}: no tokenizer that transformers can read ({str(error).splitlines()[0]}). "
            "Copy the model's tokenizer.json and tokenizer_config.json there."
        ) from error
    context = AutoConfig.from_pretrained(folder).get_text_config()
    with place.main_first():  # it fills the caches
        prepared = prepare(
            data,
            loaded,
            settings,
            validation=validation,
            model_context=getattr(context, "max_position_embeddings", None),
        )
    return Inputs(tokenizer=loaded, prepared=prepared)


def longest_row(inputs: Inputs) -> int:
    """Tokens of the longest row; of preferences, which TRL encodes, the most that it lets pass."""
    rows, most = inputs.prepared.train, inputs.prepared.counts.max_length
    return max(map(len, rows["input_ids"])) if inputs.prepared.kind == "sft" else most


def token_count(inputs: Inputs) -> int | None:
    """Tokens of an epoch; None for preferences, which TRL encodes later."""
    rows = inputs.prepared.train
    return sum(map(len, rows["input_ids"])) if inputs.prepared.kind == "sft" else None


def _trained_part(row: Mapping[str, Sequence[int]]) -> Sequence[int]:
    """The tokens of a row up to the last one that is learnt."""
    mask = row["completion_mask"]
    end = len(mask) - next((i for i, learnt in enumerate(reversed(mask)) if learnt), len(mask))
    return row["input_ids"][:end]
