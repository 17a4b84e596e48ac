"""Training data from a name to what TRL's trainers take."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

from loftq.train.data.counts import DataCounts, Tally
from loftq.train.data.files import Rows
from loftq.train.data.kinds import KINDS
from loftq.train.data.problems import BadRow, DataError
from loftq.train.data.rows import Reading, batches, start_reading
from loftq.train.data.settings import DEFAULT_LENGTH, DataSettings
from loftq.train.data.show import HeldOut, RenderedExample
from loftq.train.data.sources import open_source
from loftq.train.data.special import Special, special_tokens
from loftq.train.data.split import hold_out, seen_in_training
from loftq.train.data.templates import use_template

if TYPE_CHECKING:
    from datasets import Dataset

PROMPTS = 3
"""Held-out prompts that are answered before and after training."""
UNLIMITED = 10**9
"""A tokenizer says a length over this when it does not know its model's context."""


@dataclass(frozen=True, kw_only=True)
class Prepared:
    """Data ready for a trainer."""

    train: Dataset
    """sft: input_ids and completion_mask (1 = trained), lists of int, for SFTTrainer with
    completion_only_loss=True. preference: prompt, chosen, rejected, text or messages."""
    validation: Dataset
    """The same columns."""
    kind: str
    """sft or preference: the trainer that takes it."""
    counts: DataCounts
    example: RenderedExample
    """The first training sequence as text, its trained parts marked."""
    prompts: tuple[HeldOut, ...]
    """Up to three prompts of validation sequences with their references."""
    notes: tuple[str, ...]
    """What was chosen or left out, one sentence each, to be shown before training."""


def prepare(
    data: str,
    tokenizer: Any,
    settings: DataSettings,
    *,
    validation: str | None = None,
    model_context: int | None = None,
) -> Prepared:
    """Read, check, convert, encode and split training data.

    Deterministic. Sequences are in the order of the data; shuffling is the trainer's. The tokenizer
    is changed in place where it has to be: it gets the chat template that was asked for, and a
    padding token if it has none. Its vocabulary is never resized.

    Args:
        data: a .jsonl, .json, .parquet or .txt file (text also with .gz), a folder of them, or the
            id of a data set on the hub (ORG/NAME or ORG/NAME:CONFIGURATION).
        tokenizer: a fast tokenizer of transformers.
        settings: the choices; None among them is resolved here and said in the notes.
        validation: more data of the same kind to validate on; None = the data's own validation
            split if it has one, else samples held out of the training data.
        model_context: tokens that the model can read at once; None = what the tokenizer says.

    Raises:
        DataError: the data, a setting or the tokenizer cannot be used; bad rows are listed
            together.
    """
    _check_extra()
    bench = _Bench.of(tokenizer, settings, model_context)
    source = open_source(data)
    train = _encoded(data, source.train(), bench)
    name, rows = validation, source.validation
    if validation is not None:
        rows = open_source(validation).for_validation
    elif rows is not None:
        name = f"{data} (validation)"
    if rows is None:
        train, held = _split(train, bench)
    else:
        assert name is not None
        held = _validation(name, rows, train, bench)
    return _prepared(train, held, bench, source.notes, name)


def _check_extra() -> None:
    missing = [name for name in ("datasets", "jinja2") if find_spec(name) is None]
    if missing:
        raise DataError(f"{' and '.join(missing)} missing: pip install 'loftq[train]'.")


@dataclass(frozen=True)
class _Bench:
    """What encoding needs, whatever is encoded."""

    tokenizer: Any
    special: Special
    settings: DataSettings
    max_length: int
    notes: tuple[str, ...]

    @classmethod
    def of(cls, tokenizer: Any, settings: DataSettings, context: int | None) -> _Bench:
        special = special_tokens(tokenizer)
        template = use_template(tokenizer, settings.chat_template)
        length, reason = _length(tokenizer, settings.max_length, context)
        notes = (*special.notes, template, reason)
        return cls(tokenizer, special, settings, length, tuple(note for note in notes if note))


@dataclass(frozen=True)
class _Part:
    """The encoded rows of one source."""

    name: str
    reading: Reading
    items: list[Any]
    tally: Tally


def _length(tokenizer: Any, asked: int | None, context: int | None) -> tuple[int, str | None]:
    """max_length, and the reason for it where it was not asked for."""
    if context is None and tokenizer.model_max_length < UNLIMITED:
        context = int(tokenizer.model_max_length)
    if asked is not None:
        if context is not None and asked > context:
            raise DataError(
                f"max_length={asked}: the model reads {context} tokens at once. "
                "Choose at most that."
            )
        return asked, None
    if context is not None and context < DEFAULT_LENGTH:
        return context, f"max_length={context}: the model's context"
    return DEFAULT_LENGTH, (
        f"max_length={DEFAULT_LENGTH}: the default, for memory; the model "
        f"reads {'an unknown number of' if context is None else context} tokens at once"
    )


def _encoded(name: str, rows: Rows, bench: _Bench) -> _Part:
    """Encode the rows of a source.

    Raises:
        DataError: bad rows where none may be, or nothing that fits.
    """
    settings, tally = bench.settings, Tally()
    reading = start_reading(name, rows, settings)
    encode = KINDS[reading.format.kind].encoder(
        bench.tokenizer, bench.special, settings, bench.max_length, reading.format, tally
    )
    items: list[Any] = []
    for batch in batches(reading.samples()):
        if reading.bad.count and settings.on_bad_rows == "error":
            continue  # the remaining rows are read only to be listed
        for item in encode(batch):
            if isinstance(item, BadRow):
                reading.bad.add(item)
            else:
                items.append(item)
    reading.check(settings)
    if not items:
        raise DataError(
            f"{name}: every sample is longer than max_length={bench.max_length} tokens (the "
            f"longest has {tally.longest}). Raise max_length, or keep their "
            "beginnings with truncation=cut."
        )
    return _Part(name, reading, items, tally)


def _split(part: _Part, bench: _Bench) -> tuple[_Part, _Part]:
    """Training and held-out data of one source."""
    share, seed = bench.settings.holdout, bench.settings.seed
    train, held = hold_out(part.items, share, seed=seed, source=part.name)
    return replace(part, items=train), replace(part, items=held)


def _validation(name: str, rows: Callable[[], Rows], train: _Part, bench: _Bench) -> _Part:
    # A limit is for training: the score on a part of the validation data would be another one.
    unlimited = replace(bench, settings=replace(bench.settings, limit=None))
    held = _encoded(name, rows(), unlimited)
    kinds = train.reading.format.kind, held.reading.format.kind
    if kinds[0] != kinds[1]:
        raise DataError(f"{name}: is {kinds[1]} data, but {train.name} is {kinds[0]} data.")
    return held


def _prepared(
    train: _Part, held: _Part, bench: _Bench, found: tuple[str, ...], validation: str | None
) -> Prepared:
    parts = [train] if validation is None else [train, held]
    name = train.reading.format.kind
    kind = KINDS[name]
    counts = _counts(train, held, parts, bench.max_length, validation)
    return Prepared(
        train=kind.dataset(train.items),
        validation=kind.dataset(held.items),
        kind=name,
        counts=counts,
        example=kind.example(bench.tokenizer, train.items[0]),
        prompts=tuple(kind.held_out(bench.tokenizer, item) for item in held.items[:PROMPTS]),
        notes=(*bench.notes, *found, *_notes(parts, counts)),
    )


def _counts(
    train: _Part, held: _Part, parts: list[_Part], max_length: int, validation: str | None
) -> DataCounts:
    kind = KINDS[train.reading.format.kind]
    sizes = [[kind.size(item) for item in part.items] for part in (train, held)]
    (tokens, trained), (held_tokens, held_trained) = (
        (sum(all_ for all_, _ in size), sum(some for _, some in size)) for size in sizes
    )
    return DataCounts(
        format=train.reading.format.name,
        source=train.name,
        validation_source=validation,
        rows=sum(part.reading.count for part in parts),
        trained_rows=len(train.items),
        held_out_rows=len(held.items),
        tokens=tokens,
        trained_tokens=trained,
        held_out_tokens=held_tokens,
        held_out_trained_tokens=held_trained,
        truncated=sum(part.tally.truncated for part in parts),
        dropped=sum(part.tally.dropped for part in parts),
        skipped=sum(part.reading.bad.count for part in parts),
        duplicates=seen_in_training(map(kind.key, train.items), map(kind.key, held.items)),
        max_length=max_length,
    )


def _notes(parts: list[_Part], counts: DataCounts) -> list[str]:
    notes = []
    for part in parts:
        found, bad = part.reading.format, part.reading.bad
        notes.append(f"{part.name}: format {found.name}, {found.shape}")
        notes += part.tally.notes(part.name, counts.max_length)
        if bad.count:
            lines = "\n".join(bad.lines())
            notes.append(f"{part.name}: {bad.count} rows skipped that cannot be used:\n{lines}")
    if counts.duplicates:
        notes.append(
            f"{counts.duplicates} of {counts.held_out_rows} validation samples are training "
            "samples too: the validation loss will look better than it is"
        )
    return notes
