"""What is wrong with training data, and where."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

SHOWN = 5
"""Bad rows that a message quotes; the others are counted."""


class DataError(ValueError):
    """Data that cannot be trained on, or a tokenizer that cannot encode it."""


@dataclass(frozen=True)
class Place:
    """Where a row stands."""

    source: str
    """The file, or the hub id with its split."""
    number: int
    """Counted from 1."""
    unit: str = "row"
    """What is counted: line or row."""

    def __str__(self) -> str:
        return f"{self.source}, {self.unit} {self.number}"


@dataclass(frozen=True)
class BadRow:
    """A row that cannot be used."""

    place: Place
    reason: str
    """Found and expected, one sentence without the place."""

    def __str__(self) -> str:
        return f"{self.place}: {self.reason}"


class Unusable(Exception):
    """A row cannot be used, for the reason given; whoever knows its place makes a BadRow of it."""


def rows_of(count: int) -> str:
    """A number of rows in words: "1 row", "2 rows"."""
    return "1 row" if count == 1 else f"{count} rows"


@dataclass
class BadRows:
    """Collects bad rows, so that one message names them all."""

    limit: int = SHOWN
    count: int = 0
    first: list[BadRow] = field(default_factory=list)

    def add(self, row: BadRow) -> None:
        """Count a row, and keep it if it is among the first."""
        self.count += 1
        if len(self.first) < self.limit:
            self.first.append(row)

    def message(self) -> str:
        """All of them in a few lines, with the ways out."""
        return "\n".join(
            [
                f"{rows_of(self.count)} cannot be used:",
                *self.lines(),
                "Repair the data, or leave such rows out with on_bad_rows=skip.",
            ]
        )

    def lines(self) -> Iterable[str]:
        """The first of them, and how many more there are."""
        yield from (f"  {row}" for row in self.first)
        if self.count > len(self.first):
            yield f"  ... and {self.count - len(self.first)} more"


def kind_of_value(value: Any) -> str:
    """A value's kind in the words of JSON: "text", "a list", "null"."""
    names = {str: "text", list: "a list", dict: "an object", type(None): "null", bool: "a boolean"}
    return names.get(type(value), "a number" if isinstance(value, int | float) else "no JSON")
