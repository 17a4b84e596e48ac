"""A comparison of one number: score against the number of alternations, or any other option.

LoftQ's Figure 3 is one. Bytes are the same along such a curve, so that the usual picture has
nothing to say.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from loftq.lab.compare.arms import Arm, parse_arm
from loftq.lab.compare.statistics import Line
from loftq.lab.compare.table import Comparison, scale

if TYPE_CHECKING:
    from matplotlib.axes import Axes

FEWEST = 3
"""Values of an option that make a curve."""
FAR = 20
"""Times the smallest perplexity from which an axis is logarithmic."""
SYMBOLS = {"iters": "T, alternations"}
"""What papers call an option."""


@dataclass(frozen=True, kw_only=True)
class Curves:
    """Lines that differ in one option alone."""

    option: str
    each: dict[str, tuple[tuple[float, Line], ...]]
    """Name -> (value of the option, line), ascending."""
    others: tuple[Line, ...]
    """Lines that have no value of the option: drawn across."""


def curves_of(lines: tuple[Line, ...]) -> Curves | None:
    """The lines as curves over the first option with enough values, None if there is none."""
    arms = {line: parse_arm(line[0]) for line in lines}
    for option in dict.fromkeys(name for arm in arms.values() for name in arm.options):
        each: dict[str, list[tuple[float, Line]]] = {}
        for line, arm in arms.items():
            value = arm.options.get(option)
            if isinstance(value, int | float) and not isinstance(value, bool):
                each.setdefault(_name(arm, option, line), []).append((float(value), line))
        whole = {name: tuple(sorted(found)) for name, found in each.items() if len(found) >= FEWEST}
        if whole:
            drawn = {line for found in whole.values() for _, line in found}
            rest = tuple(line for line in lines if line not in drawn)
            return Curves(option=option, each=whole, others=rest)
    return None


def draw_curves(axes: Axes, found: Comparison, task: str, curves: Curves, colors: tuple) -> None:
    """Median of the seeds with its smallest and largest value, one curve a name."""
    metric, up = None, True
    for place, (name, points) in enumerate(curves.each.items()):
        rows = [(x, s) for x, line in points if (s := found.summary(line, task)) is not None]
        rows = [(x, s) for x, s in rows if s.median is not None]
        if not rows:
            continue
        metric, up = rows[0][1].metric, rows[0][1].greater_is_better
        times = scale(metric)
        middle = [times * float(s.median or 0) for _, s in rows]
        ends = [s.spread or (float(s.median or 0),) * 2 for _, s in rows]
        errors = [
            [m - times * low for m, (low, _) in zip(middle, ends, strict=True)],
            [times * high - m for m, (_, high) in zip(middle, ends, strict=True)],
        ]
        axes.errorbar(
            [x for x, _ in rows], middle, yerr=errors, label=name,
            color=colors[place % len(colors)], marker="o", ms=5, lw=1.3, capsize=2.5,
        )  # fmt: skip
    for place, line in enumerate(curves.others, len(curves.each)):
        summary = found.summary(line, task)
        if summary is not None and summary.median is not None:
            metric, up = summary.metric, summary.greater_is_better
            height = scale(metric) * summary.median
            axes.axhline(height, color=colors[place % len(colors)], lw=1.1, ls="--", label=line[0])
    axes.set_title(task, fontsize=10)
    axes.set_xlabel(SYMBOLS.get(curves.option, curves.option))
    name_scores(axes, metric, up)


def name_scores(axes: Axes, metric: str | None, up: bool) -> None:
    """The axis of the scores; logarithmic where perplexities lie far apart, as of a collapse."""
    axes.set_ylabel(f"{metric or 'no row yet'} ({'higher' if up else 'lower'} is better)")
    low, high = axes.dataLim.intervaly
    if (metric or "").startswith("perplexity") and 0 < low < high / FAR:
        axes.set_yscale("log")


def _name(arm: Arm, option: str, line: Line) -> str:
    kept = [f"{key}={value}" for key, value in arm.options.items() if key != option]
    shape = [part for part in (line[1], None if line[2] is None else f"r = {line[2]}") if part]
    return ", ".join([":".join([arm.method, *kept]), *shape])
