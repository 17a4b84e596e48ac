"""The rows of a file. A new kind of file is a row of READERS."""

from __future__ import annotations

import gzip
import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, TypeAlias

from loftq.train.data.problems import BadRow, DataError, Place, kind_of_value
from loftq.train.data.samples import CONTINUES

BLOCK_CHARACTERS = 32_768
"""A text file is read in blocks of whole paragraphs of about this size."""


@dataclass(frozen=True)
class Row:
    """An object with named values; a null is the same as no value."""

    place: Place
    values: Mapping[str, Any]


Rows: TypeAlias = Iterator[Row | BadRow]


def read_file(path: Path) -> Rows:
    """The rows of a file in order, each read when it is asked for.

    Raises:
        DataError: another kind of file, or one that cannot be read at all. A row that cannot be
            read is a BadRow among the others.
    """
    reader = READERS.get(kind_of(path))
    if reader is None:
        raise DataError(f"{path}: {path.suffix or 'no'} suffix; expected one of {known_kinds()}.")
    try:
        yield from reader(path)
    except (OSError, EOFError) as error:
        raise DataError(f"{path}: cannot be read ({error}).") from error


def kind_of(path: Path) -> str:
    """The suffix that decides how a file is read, .gz left out."""
    return (path.with_suffix("").suffix if path.suffix == ".gz" else path.suffix).lower()


def known_kinds() -> str:
    """The suffixes that can be read, for messages."""
    return f"{', '.join(READERS)} (text files also with .gz)"


def as_row(place: Place, value: Any) -> Row | BadRow:
    """A row of an object; anything else is a bad row."""
    if not isinstance(value, Mapping):
        return BadRow(place, f"is {kind_of_value(value)}; expected an object with named columns.")
    return Row(place, {str(key): held for key, held in value.items() if held is not None})


def _read_jsonl(path: Path) -> Rows:
    with _open(path) as file:
        yield from _json_lines(path, file)


def _json_lines(path: Path, lines: Iterable[bytes]) -> Rows:
    for number, raw in enumerate(lines, 1):
        place = Place(str(path), number, "line")
        try:
            line = raw.decode("utf-8-sig" if number == 1 else "utf-8")
            if line.strip():
                yield as_row(place, json.loads(line))
        except UnicodeDecodeError as error:
            reason = f"not UTF-8 (byte 0x{raw[error.start]:02x} at {error.start})"
            yield BadRow(place, f"{reason}. Convert the file to UTF-8.")
        except (ValueError, RecursionError) as error:
            yield BadRow(place, f"not JSON ({error}).")


def _read_json(path: Path) -> Rows:
    """A list of objects; a file of one object a line is read as such."""
    with _open(path) as file:
        raw = file.read()
    if not raw.lstrip(b"\xef\xbb\xbf \t\r\n").startswith(b"["):
        yield from _json_lines(path, _lines_of(path, raw))
        return
    try:
        found = json.loads(_decoded(path, raw))
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path}: not JSON ({error}).") from error
    yield from (as_row(Place(str(path), n), value) for n, value in enumerate(found, 1))


def _lines_of(path: Path, raw: bytes) -> list[bytes]:
    lines = raw.splitlines()
    if len(lines) > 1 and lines[0].strip(b"\xef\xbb\xbf \t") == b"{":
        raise DataError(f"{path}: is one object; expected a list of objects, or one object a line.")
    return lines


def _read_parquet(path: Path) -> Rows:
    from pyarrow import ArrowException
    from pyarrow.parquet import ParquetFile

    number = 0
    try:
        for batch in ParquetFile(path).iter_batches(batch_size=1024):
            for value in batch.to_pylist():
                number += 1
                yield as_row(Place(str(path), number), value)
    except ArrowException as error:
        raise DataError(f"{path}: not a readable parquet file ({error}).") from error


def _read_text(path: Path) -> Rows:
    """One document, in blocks of whole paragraphs."""
    with _open(path) as file:
        text = _decoded(path, file.read()).replace("\r\n", "\n").strip("\n")
    blocks = list(_blocks(text)) if text.strip() else []
    for number, block in enumerate(blocks, 1):
        place = Place(str(path), number, "block")
        yield Row(place, {"text": block, CONTINUES: number < len(blocks)})


def _blocks(text: str) -> Iterator[str]:
    """The text in pieces, each ending with a paragraph, a line, or where it must."""
    start = 0
    while start < len(text):
        end = start + BLOCK_CHARACTERS
        if end < len(text):
            for mark in ("\n\n", "\n", " "):
                found = text.rfind(mark, start + 1, end)
                if found > 0:
                    # A space belongs to the word after it, as tokenizers see it.
                    end = found if mark == " " else found + len(mark)
                    break
        yield text[start:end]
        start = end


def _decoded(path: Path, raw: bytes) -> str:
    try:
        return raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = raw.count(b"\n", 0, error.start) + 1
        raise DataError(
            f"{path}, line {line}: not UTF-8 (byte 0x{raw[error.start]:02x}). "
            "Convert the file to UTF-8."
        ) from error


def _open(path: Path) -> IO[bytes]:
    return gzip.open(path, "rb") if path.suffix == ".gz" else path.open("rb")  # type: ignore[return-value]


READERS: Mapping[str, Callable[[Path], Rows]] = {
    ".jsonl": _read_jsonl,
    ".json": _read_json,
    ".parquet": _read_parquet,
    ".txt": _read_text,
}
"""By suffix."""
