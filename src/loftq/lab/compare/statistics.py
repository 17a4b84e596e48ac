"""From rows to the cells of a table: medians, spread, and differences of the same seeds."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from statistics import median
from typing import Any

from loftq.lab.compare.store import DIVERGED, DONE, Row

Line = tuple[str, str | None, int | None]
"""Arm, format, rank."""


@dataclass(frozen=True, kw_only=True)
class Summary:
    """The runs of one line on one task."""

    task: str
    line: Line
    metric: str | None
    greater_is_better: bool
    values: tuple[float, ...]
    """Of the runs that converged, by seed."""
    seeds: tuple[int, ...]
    """Their seeds."""
    diverged: int
    failed: int

    @property
    def median(self) -> float | None:
        """Of all runs that ended, those that diverged being the worst; None if one is it."""
        worst = -math.inf if self.greater_is_better else math.inf
        ended = [*self.values, *[worst] * self.diverged]
        found = median(ended) if ended else worst
        return found if math.isfinite(found) else None

    @property
    def spread(self) -> tuple[float, float] | None:
        """Smallest and largest value of the runs that converged."""
        return (min(self.values), max(self.values)) if self.values else None

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready."""
        return {**asdict(self), "median": self.median, "spread": self.spread}


@dataclass(frozen=True, kw_only=True)
class Difference:
    """A line against another on the seeds that both have; positive is better."""

    task: str
    line: Line
    against: Line
    values: tuple[float, ...]
    """Improvement by seed, in the unit of the metric."""

    @property
    def median(self) -> float:
        """Of the seeds."""
        return median(self.values)

    @property
    def wins(self) -> int:
        """Seeds on which the line is strictly better."""
        return sum(value > 0 for value in self.values)

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready."""
        return {**asdict(self), "median": self.median, "wins": self.wins}


def summarise(rows: Iterable[Row]) -> list[Summary]:
    """One summary for each line and task, in the order in which they first appear."""
    groups: dict[tuple[Line, str], list[Row]] = {}
    for row in rows:
        groups.setdefault((row.line, row.task), []).append(row)
    return [_summary(line, task, found) for (line, task), found in groups.items()]


def _summary(line: Line, task: str, rows: Sequence[Row]) -> Summary:
    scored = sorted((row for row in rows if _is_scored(row)), key=lambda row: row.seed)
    lost = sum(
        row.status == DIVERGED or (row.status == DONE and not _is_scored(row)) for row in rows
    )
    first = next((row for row in rows if row.primary), None)
    return Summary(
        task=task,
        line=line,
        metric=first.primary if first else None,
        greater_is_better=first.greater_is_better if first else True,
        values=tuple(row.value for row in scored if row.value is not None),
        seeds=tuple(row.seed for row in scored),
        diverged=lost,
        failed=len(rows) - len(scored) - lost,
    )


def _is_scored(row: Row) -> bool:
    return row.status == DONE and row.value is not None and math.isfinite(row.value)


def differences(summaries: Iterable[Summary], against: Line) -> list[Difference]:
    """Every other line against one, task by task, where they share seeds."""
    summaries = list(summaries)
    base = {found.task: found for found in summaries if found.line == against}
    result = []
    for found in summaries:
        other = base.get(found.task)
        if other is None or found.line == against:
            continue
        theirs = dict(zip(other.seeds, other.values, strict=True))
        sign = 1 if found.greater_is_better else -1
        gains = tuple(
            sign * (value - theirs[seed])
            for seed, value in zip(found.seeds, found.values, strict=True)
            if seed in theirs
        )
        if gains:
            result.append(
                Difference(task=found.task, line=found.line, against=against, values=gains)
            )
    return result
