"""Two ways to answer, for people and for machines, and how numbers read."""

from __future__ import annotations

import contextlib
import json
import math
import os
import sys
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from loftq.units import duration as duration  # verbs say console.duration, console.size
from loftq.units import size as size

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

PIPED_WIDTH = 1000
"""Columns where the output is not a terminal and COLUMNS is not set: nothing is folded."""


def screen(*, as_json: bool = False) -> Console:
    """Where text for people goes: stdout, or nowhere when stdout belongs to JSON."""
    from rich.console import Console

    piped = not sys.stdout.isatty() and "COLUMNS" not in os.environ
    return Console(
        quiet=as_json, markup=False, highlight=False, width=PIPED_WIDTH if piped else None
    )


def side_screen() -> Console:
    """Where progress goes: stderr; `is_terminal` says whether anybody looks."""
    from rich.console import Console

    return Console(stderr=True, markup=False, highlight=False)


@contextlib.contextmanager
def answering(*, as_json: bool) -> Iterator[None]:
    """Keep stdout clean for one JSON object: what libraries print meanwhile goes to stderr."""
    with contextlib.redirect_stdout(sys.stderr) if as_json else contextlib.nullcontext():
        yield


def emit(value: Any) -> None:
    """Print one JSON object; numbers that JSON lacks (infinity, NaN) become null."""
    print(json.dumps(_finite(value), indent=2, ensure_ascii=False, allow_nan=False))


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def table(*columns: str, right: tuple[str, ...] = ()) -> Table:
    """A table with a header line; the columns in `right` are aligned right."""
    from rich import box
    from rich.table import Table

    made = Table(box=box.SIMPLE_HEAD, pad_edge=False, show_edge=False)
    for column in columns:
        made.add_column(column, justify="right" if column in right else "left", overflow="fold")
    return made


def facts() -> Table:
    """Lines of a name, a value and a remark."""
    from rich.table import Table

    made = Table.grid(padding=(0, 2))
    made.add_column(style="dim", no_wrap=True)
    made.add_column(overflow="fold")
    made.add_column(style="dim", overflow="fold")
    return made


def count(number: int, noun: str) -> str:
    """1 layer, 2 layers."""
    return f"{number:,} {noun}" + ("" if number == 1 else "s")
