"""From a source to samples: detect the format, convert, collect what cannot be used."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import chain, islice
from typing import TypeVar

from loftq.train.data.files import Row, Rows
from loftq.train.data.formats import FORMATS, Format, detect, sample_of
from loftq.train.data.problems import BadRow, BadRows, DataError, Place, Unusable
from loftq.train.data.samples import Sample
from loftq.train.data.settings import DataSettings

LOOKED_AT = 100
"""Rows that the format is detected from."""
BATCH = 512
"""Rows that are encoded together."""

Item = TypeVar("Item")


@dataclass
class Reading:
    """The rows of one source on their way to samples, once through."""

    name: str
    """The source, as the user named it."""
    format: Format
    rows: Iterator[Row | BadRow]
    count: int = 0
    """Rows seen so far."""
    bad: BadRows = field(default_factory=BadRows)

    def samples(self) -> Iterator[tuple[Place, Sample]]:
        """Each usable row's sample; the others are added to `bad`."""
        for row in self.rows:
            self.count += 1
            if isinstance(row, BadRow):
                self.bad.add(row)
                continue
            try:
                yield row.place, sample_of(row.values, self.format)
            except Unusable as error:
                self.bad.add(BadRow(row.place, str(error)))

    def check(self, settings: DataSettings) -> None:
        """Call after the last row: raises DataError if there are bad rows and none may be."""
        if self.bad.count and settings.on_bad_rows == "error":
            raise DataError(self.bad.message())
        if self.bad.count == self.count:
            lines = "\n".join(self.bad.lines())
            raise DataError(f"{self.name}: none of the {self.count} rows can be used:\n{lines}")


def start_reading(name: str, rows: Rows, settings: DataSettings) -> Reading:
    """Look at the first rows to find their format.

    Raises:
        DataError: no rows, or rows of no format or of several.
    """
    limited = islice(rows, settings.limit)
    first = list(islice(limited, LOOKED_AT))
    if not first:
        raise DataError(f"{name}: holds no rows. Check that it is the data you mean.")
    if settings.data_format is not None:
        found = FORMATS[settings.data_format]
    else:
        found = _detected(name, first)
    return Reading(name, found, chain(first, limited))


def _detected(name: str, first: list[Row | BadRow]) -> Format:
    readable = [(row.place, row.values) for row in first if isinstance(row, Row)]
    if not readable:
        bad = BadRows()
        for row in first:
            if isinstance(row, BadRow):
                bad.add(row)
        lines = "\n".join(bad.lines())
        raise DataError(f"{name}: none of the first {len(first)} rows can be read:\n{lines}")
    return detect(readable)


def batches(items: Iterator[Item]) -> Iterator[list[Item]]:
    """Lists of BATCH items, the last one shorter."""
    while batch := list(islice(items, BATCH)):
        yield batch
