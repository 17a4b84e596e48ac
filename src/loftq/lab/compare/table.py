"""The table of a comparison, for readers and for machines."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

from loftq.lab.compare.cells import Cell, cells
from loftq.lab.compare.recipe import CompareRecipe, matches
from loftq.lab.compare.statistics import Difference, Line, Summary, differences, summarise
from loftq.lab.compare.store import DONE, Row
from loftq.units import duration

TABLE_VERSION = 1
NOT_CONVERGED = "N.A."


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """A matrix with what is known of it."""

    recipe: CompareRecipe
    cells: tuple[Cell, ...]
    rows: tuple[Row, ...]
    """In the order of the cells; those that are not made yet are missing."""
    summaries: tuple[Summary, ...]
    differences: tuple[Difference, ...]

    @property
    def lines(self) -> list[Line]:
        """Lines of the table, in the order of the recipe."""
        return list(dict.fromkeys(cell.line for cell in self.cells))

    def row_of(self, line: Line) -> Row | None:
        """A row that knows the bytes of a line."""
        return next((row for row in self.rows if row.line == line and row.bytes), None)

    def summary(self, line: Line, task: str) -> Summary | None:
        """The runs of a line on a task, None if there are none yet."""
        found = (s for s in self.summaries if (s.line, s.task) == (line, task))
        return next(found, None)

    def published(self, line: Line, task: str) -> Mapping[str, str] | None:
        """What was published for it, None if nothing; {} if it did not converge."""
        axes = dict(zip(("method", "format", "rank"), line, strict=True))
        for row in self.recipe.published:
            if task in row.scores and matches(row.where, axes):
                return row.scores[task] or {}
        return None

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready: the table with every row that it was made from."""
        return {
            "version": TABLE_VERSION,
            "recipe": self.recipe.name,
            "model": self.recipe.model,
            "cells": len(self.cells),
            "summaries": [found.to_dict() for found in self.summaries],
            "differences": [found.to_dict() for found in self.differences],
            "rows": [row.to_dict() for row in self.rows],
        }


def compare(
    recipe: CompareRecipe, rows: Iterable[Row], *, against: str | None = None
) -> Comparison:
    """Arrange the rows of a recipe's cells.

    Args:
        recipe: whose cells.
        rows: any; those of other cells are left out.
        against: arm that the others are compared with; None = the first that quantizes, since a
            16-bit baseline has no equal of its size.

    Raises:
        ValueError: no such arm.
    """
    planned = cells(recipe)
    known = {row.cell: row for row in rows}
    found = tuple(known[cell.name] for cell in planned if cell.name in known)
    summaries = summarise(found)
    base = _against(planned, against)
    paired = [
        difference
        for line in dict.fromkeys(cell.line for cell in planned)
        if line[0] == base
        for difference in differences(_alike(summaries, line), line)
    ]
    return Comparison(
        recipe=recipe,
        cells=tuple(planned),
        rows=found,
        summaries=tuple(summaries),
        differences=tuple(paired),
    )


def _against(planned: Sequence[Cell], wanted: str | None) -> str:
    names = list(dict.fromkeys(cell.arm.name for cell in planned))
    if wanted is None:
        return next((cell.arm.name for cell in planned if cell.arm.quantizes), names[0])
    if wanted not in names:
        raise ValueError(f"no method {wanted!r} in this comparison. It has {', '.join(names)}.")
    return wanted


def _alike(summaries: Iterable[Summary], line: Line) -> list[Summary]:
    """Lines of the same format and rank, or without any."""
    return [
        found
        for found in summaries
        if all(
            own is None or own == other for own, other in zip(found.line[1:], line[1:], strict=True)
        )
    ]


def markdown(found: Comparison, *, picture: str | None = None) -> str:
    """The table as Markdown, with everything that decides its numbers."""
    parts = [f"# {found.recipe.name}", found.recipe.purpose, _scores(found)]
    if found.differences:
        parts += [f"Against `{found.differences[0].against[0]}`, same format, rank and seeds "
                  "(median of the paired differences, smallest to largest, seeds won; positive is "
                  "better):", _paired(found)]  # fmt: skip
    if picture is not None:
        parts.append(f"![The scores]({picture})")
    parts += [_conditions(found), *_failures(found)]
    return "\n\n".join(parts) + "\n"


def _scores(found: Comparison) -> str:
    tasks = list(found.recipe.tasks)
    heads = [f"{task} ({_metric(found, task)})" for task in tasks]
    body = []
    for line in found.lines:
        row = found.row_of(line)
        size = f"{row.bytes.total / 1e6:.1f}" if row and row.bytes else ""
        bits = f"{row.bits_per_weight:.2f}" if row and row.bits_per_weight else ""
        scores = [_score(found, line, task) for task in tasks]
        body.append([*_names(line), bits, size, _minutes(found, line), *scores])
    return grid(["method", "format", "rank", "bits", "MB", "min", *heads], body, left=2)


def _minutes(found: Comparison, line: Line) -> str:
    """By the clock, of all runs of a line; nothing before the first."""
    runs = [sum(row.seconds.values()) for row in found.rows if row.line == line and row.seconds]
    return f"{sum(runs) / 60:.1f}" if runs else ""


def _metric(found: Comparison, task: str) -> str:
    names = [s.metric for s in found.summaries if s.task == task and s.metric]
    return names[0] if names else "no row yet"


def _score(found: Comparison, line: Line, task: str) -> str:
    summary = found.summary(line, task)
    text = "" if summary is None else summary_text(summary)
    theirs = found.published(line, task)
    if theirs is None:
        return text
    printed = "/".join(theirs.values()) or NOT_CONVERGED
    return f"{text} [{printed}]".strip()


def summary_text(summary: Summary) -> str:
    """Median, smallest to largest, and how many runs, in the unit that papers print."""
    show = formatter(summary.metric)
    if summary.median is None:
        text = NOT_CONVERGED if summary.diverged else "failed"
    else:
        text = show(summary.median)
        low, high = summary.spread or (summary.median, summary.median)
        text += f" ({show(low)} to {show(high)})" if len(summary.values) > 1 else ""
    runs = len(summary.values) + summary.diverged
    lost = [f"{summary.diverged} diverged"] if summary.diverged and summary.values else []
    lost += [f"{summary.failed} failed"] if summary.failed and runs else []
    return f"{text}, n={runs}" + "".join(f", {word}" for word in lost) if runs else text


def formatter(metric: str | None) -> Callable[[float], str]:
    """How a metric is written: losses and perplexities as they are, shares times 100."""
    found = [show for start, show in UNBOUNDED.items() if (metric or "").startswith(start)]
    return found[0] if found else lambda value: f"{scale(metric) * value:.1f}"


def scale(metric: str | None) -> int:
    """What a metric is multiplied by in tables and pictures: shares by 100."""
    return 1 if lower_is_better(metric or "") else 100


def lower_is_better(metric: str) -> bool:
    """Whether a metric is a loss or a perplexity."""
    return metric.startswith(tuple(UNBOUNDED))


UNBOUNDED: Mapping[str, Callable[[float], str]] = {
    "loss": lambda value: f"{value:.4f}",
    "answer_loss": lambda value: f"{value:.4f}",
    "perplexity": lambda value: f"{value:.2f}" if value < 1e4 else f"{value:.2g}",
}
"""Beginnings of the names of metrics that are no share of one, and how they are written."""


def _paired(found: Comparison) -> str:
    tasks = list(found.recipe.tasks)
    table: dict[Line, dict[str, str]] = {}
    for entry in found.differences:
        summary = found.summary(entry.line, entry.task)
        show = formatter(summary.metric if summary else None)
        ends = f" ({_signed(show, min(entry.values))} to {_signed(show, max(entry.values))})"
        text = _signed(show, entry.median) + (ends if len(entry.values) > 1 else "")
        table.setdefault(entry.line, {})[entry.task] = f"{text}, {entry.wins}/{len(entry.values)}"
    body = [[*_names(line), *(row.get(task, "") for task in tasks)] for line, row in table.items()]
    return grid(["method", "format", "rank", *tasks], body, left=2)


def _signed(show: Callable[[float], str], value: float) -> str:
    return ("+" if value >= 0 else "-") + show(abs(value))


def _conditions(found: Comparison) -> str:
    machines = Counter(_machine(row) for row in found.rows)
    seconds = sum(sum(row.seconds.values()) for row in found.rows)
    counts = Counter(row.examples for row in found.rows if row.examples)
    lines = [
        f"Model: {found.recipe.model}. {len(found.rows)} of {len(found.cells)} cells, "
        f"{duration(seconds)} of training and evaluation.",
        "A score is the median of the seeds (smallest to largest, number of runs); N.A. did not "
        "converge; [published] where the recipe knows a number. MB is everything that is stored: "
        "packed weights with their scales, the rest of the base at 16 bits, adapters and head in "
        "float32. min is minutes of training and evaluation, of all runs of the line together; "
        "processes that share a device each take longer.",
        *(f"Machine: {text} ({number} cells)." for text, number in machines.items()),
    ]
    if len(counts) == 1:
        lines.append(f"Every score is over {next(iter(counts))} examples.")
    return "\n\n".join(lines + _sampling(found))


def _sampling(found: Comparison) -> list[str]:
    """How far a run's score is uncertain by its examples, which no number of seeds shows."""
    widths: dict[str, list[float]] = {}
    for row in found.rows:
        if row.interval is not None and row.status == DONE:
            widths.setdefault(row.task, []).append((row.interval[1] - row.interval[0]) / 2)
    if not widths:
        return []
    each = ", ".join(
        f"{task} ±{formatter(_metric(found, task))(median(values))}"
        for task, values in widths.items()
    )
    return [f"95 % of a single run for other examples of the kind (median of the runs): {each}."]


def _machine(row: Row) -> str:
    return ", ".join(
        value if key in ("device", "date") else f"{key} {value}"
        for key, value in row.machine.items()
        if value
    )


def _failures(found: Comparison) -> list[str]:
    lost = [row for row in found.rows if row.status != DONE]
    if not lost:
        return []
    lines = [f"- `{row.cell}` {row.status}: {(row.error or '').splitlines()[0]}" for row in lost]
    return ["Cells without a score:", "\n".join(lines)]


def _names(line: Line) -> list[str]:
    method, format, rank = line
    return [f"`{method}`", format or "16 bits", "" if rank is None else str(rank)]


def grid(heads: Sequence[str], body: Iterable[Sequence[str]], *, left: int = 1) -> str:
    """A Markdown table; all but the first `left` columns are aligned right."""
    rule = ["---" if place < left else "--:" for place in range(len(heads))]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in (heads, rule, *body))
