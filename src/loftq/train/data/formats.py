"""The formats of a row: how each is recognised, and what it means.

A new format is a row of FORMATS: a name, the columns it needs, and a function from row to sample.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from loftq.train.data import convert
from loftq.train.data.problems import DataError, Place, Unusable
from loftq.train.data.samples import Sample

Values = Mapping[str, Any]


@dataclass(frozen=True, kw_only=True)
class Format:
    """One way to write a row."""

    name: str
    shape: str
    """What a row holds, as messages show it."""
    fits: Callable[[Values], bool]
    """Whether the columns are there and of the right kind; what they hold is checked later."""
    convert: Callable[[Values], Sample]
    """Raises Unusable when what the columns hold cannot be trained on."""
    kind: str = "sft"
    """sft or preference."""
    completion_only: bool = True
    """Train on answers only unless told otherwise."""


def _turns_with(*keys: str) -> Callable[[Values], bool]:
    """A list of turns that have these keys, in one of the columns that hold turns."""
    return lambda row: any(
        isinstance(row.get(column), list)
        and any(isinstance(turn, Mapping) and set(keys) <= set(turn) for turn in row[column])
        for column in convert.TURN_COLUMNS
    )


def _columns(*names: str) -> Callable[[Values], bool]:
    return lambda row: set(names) <= set(row)


_TABLE = (
    # The first that fits wins, so the more particular come first.
    Format(
        name="preference",
        shape='{"prompt", "chosen", "rejected"} (text or messages; prompt may be left out)',
        fits=_columns("chosen", "rejected"),
        convert=convert.preference,
        kind="preference",
    ),
    Format(
        name="messages",
        shape='{"messages": [{"role", "content"}, ...]}',
        fits=_turns_with("role"),
        convert=convert.messages,
    ),
    Format(
        name="sharegpt",
        shape='{"conversations": [{"from", "value"}, ...]}',
        fits=_turns_with("from", "value"),
        convert=convert.sharegpt,
    ),
    Format(
        name="alpaca",
        shape='{"instruction", "input" (may be left out), "output"}',
        fits=_columns("instruction", "output"),
        convert=convert.alpaca,
    ),
    Format(
        name="prompt-completion",
        shape='{"prompt", "completion"} (text or messages)',
        fits=_columns("prompt", "completion"),
        convert=convert.prompt_completion,
    ),
    Format(
        name="text",
        shape='{"text"}',
        fits=_columns("text"),
        convert=convert.text,
        completion_only=False,
    ),
)
FORMATS: Mapping[str, Format] = {row.name: row for row in _TABLE}


def format_of(row: Values) -> Format | None:
    """The first format of the table that a row fits."""
    return next((known for known in FORMATS.values() if known.fits(row)), None)


def detect(rows: Sequence[tuple[Place, Values]]) -> Format:
    """The format of a sample of rows.

    Rows that fit no format are left to be reported with their line, as long as others fit one.

    Raises:
        DataError: no row fits a format, or rows fit different ones.
    """
    seen: Counter[str] = Counter()
    places: dict[str, Place] = {}
    for place, row in rows:
        found = format_of(row)
        if found is not None:
            seen[found.name] += 1
            places.setdefault(found.name, place)
    if not seen:
        place, row = rows[0]
        raise DataError(f"{place}: {misfit(row)}")
    if len(seen) > 1:
        each = "; ".join(f"{name} ({n} rows, {places[name]})" for name, n in seen.most_common())
        raise DataError(
            f"the first {len(rows)} rows are of different formats: {each}. Split the data by "
            "format, or take one with data_format=NAME and on_bad_rows=skip."
        )
    return FORMATS[next(iter(seen))]


def sample_of(row: Values, expected: Format) -> Sample:
    """What a row means.

    Raises:
        Unusable: the row is of another format, or cannot be trained on.
    """
    if expected.fits(row):
        return expected.convert(row)
    other = format_of(row)
    if other is not None:
        raise Unusable(f"is {other.name}, but the data is {expected.name} ({expected.shape}).")
    raise Unusable(misfit(row, expected))


def misfit(row: Values, expected: Format | None = None) -> str:
    """Which columns a row has, and which were expected."""
    columns = ", ".join(row) or "none"
    if expected is not None:
        return f"has the columns {columns}; expected {expected.shape}."
    shapes = "\n".join(f"  {known.name}: {known.shape}" for known in FORMATS.values())
    return f"has the columns {columns}, which is none of the formats\n{shapes}\nRename the columns."
