"""Score against bytes: what a comparison looks like."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from loftq.lab.compare.curves import curves_of, draw_curves, name_scores
from loftq.lab.compare.statistics import Line
from loftq.lab.compare.table import Comparison, scale

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

PANEL = (4.4, 3.4)  # inches
COLUMNS = 3
LEGEND = 0.21  # inches of a line
COLORS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#6f6f6f", "#000000")
"""Distinguishable with any colour vision (Okabe and Ito)."""
STEP = 1.03
"""Ratio of two places side by side; lines whose bytes differ by less share a place."""
MARKS = ("o", "s", "^", "D", "v", "P", "X", "*")
"""By format and rank; colours are methods."""
STYLE = {
    "font.size": 9.5, "axes.spines.top": False, "axes.spines.right": False, "axes.grid": True,
    "grid.color": "#e3e3e3", "axes.axisbelow": True, "legend.frameon": False,
    "svg.hashsalt": "loftq", "svg.fonttype": "none",
}  # fmt: skip


def draw(found: Comparison, path: Path) -> Path:
    """Write the picture; its kind follows the name's end (.svg, .png).

    A panel for each task: stored bytes on a logarithmic axis, the median of the seeds with its
    smallest and largest value. A line whose median run diverged has no point. Lines that differ in
    a number, as of alternations, are curves over that number.

    Raises:
        ValueError: no matplotlib.
    """
    tasks = list(found.recipe.tasks)
    columns = min(COLUMNS, len(tasks))
    rows = math.ceil(len(tasks) / columns)
    below = LEGEND * math.ceil(len(found.lines) / columns)
    with drawn(path, (PANEL[0] * columns, PANEL[1] * rows + 0.5 + below)) as figure:
        panels = figure.subplots(rows, columns, squeeze=False).flat
        curves = curves_of(tuple(found.lines))
        for task, panel in zip(tasks, panels, strict=False):
            if curves is None:
                _panel(panel, found, task)
            else:
                draw_curves(panel, found, task, curves, COLORS)
        for panel in list(panels):
            panel.set_visible(False)
        if curves is None:
            figure.legend(handles=_legend(found), loc="outside lower center", ncols=columns)
        else:
            named = figure.axes[0].get_legend_handles_labels()
            figure.legend(*named, loc="outside lower center", ncols=min(2, columns))
        figure.suptitle(f"{found.recipe.name}: {Path(found.recipe.model).name}", fontsize=10.5)
    return path


@contextmanager
def drawn(path: Path, size: tuple[float, float]) -> Iterator[Figure]:
    """A figure of `size` inches in our style, written to `path` at the end; without its date.

    Raises:
        ValueError: no matplotlib.
    """
    try:
        import matplotlib
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ValueError("the picture needs matplotlib: pip install 'loftq[report]'.") from error

    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=size, layout="constrained")
        yield figure
        metadata = {"Date": None} if path.suffix == ".svg" else None
        figure.savefig(path, metadata=metadata, dpi=150)


def _panel(axes: Axes, found: Comparison, task: str) -> None:
    metric, up, places = None, True, _places(found)
    for line in found.lines:
        summary, row = found.summary(line, task), found.row_of(line)
        if summary is None or row is None or row.bytes is None or summary.median is None:
            continue
        metric, up = summary.metric, summary.greater_is_better
        times = scale(metric)
        low, high = summary.spread or (summary.median, summary.median)
        ends = [[times * (summary.median - low)], [times * (high - summary.median)]]
        place = places[line] / 1e6
        axes.errorbar(place, times * summary.median, yerr=ends, **_look(found, line))
    axes.set_title(task, fontsize=10)
    axes.set_xscale("log")
    name_scores(axes, metric, up)
    axes.set_xlabel("stored, MB (logarithmic; equal sizes side by side)")
    _plain_ticks(axes)


def _places(found: Comparison) -> dict[Line, float]:
    """Bytes of each line; lines of equal bytes stand side by side, the middle one in its place."""
    groups: dict[int, list[Line]] = {}
    for line in found.lines:
        row = found.row_of(line)
        if row is not None and row.bytes is not None:
            groups.setdefault(round(math.log(row.bytes.total) / math.log(STEP)), []).append(line)
    places = {}
    for group in groups.values():
        rows = [found.row_of(line) for line in group]
        center = sum(row.bytes.total for row in rows if row and row.bytes) / len(group)
        for place, line in enumerate(group):
            places[line] = center * STEP ** (place - (len(group) - 1) / 2)
    return places


def _plain_ticks(axes: Axes) -> None:
    from matplotlib.ticker import FuncFormatter, LogLocator

    plain = FuncFormatter(lambda value, _: f"{value:g}")
    axes.xaxis.set_major_locator(LogLocator(10, subs=(1, 1.5, 2, 3, 5, 7)))
    axes.xaxis.set_major_formatter(plain)
    axes.xaxis.set_minor_formatter(FuncFormatter(lambda value, _: ""))


def _look(found: Comparison, line: Line) -> dict[str, Any]:
    methods = list(dict.fromkeys(method for method, _, _ in found.lines))
    shapes = list(dict.fromkeys(other[1:] for other in found.lines))
    color = COLORS[methods.index(line[0]) % len(COLORS)]
    return {
        "color": color, "marker": MARKS[shapes.index(line[1:]) % len(MARKS)], "ls": "none",
        "ms": 6, "capsize": 2.5, "lw": 1.2, "mfc": color, "mec": "white", "mew": 0.6,
    }  # fmt: skip


def _legend(found: Comparison) -> list[Any]:
    from matplotlib.lines import Line2D

    handles = []
    for line in found.lines:
        if found.row_of(line) is None:
            continue
        look = _look(found, line)
        look.pop("capsize")
        method, format, rank = line
        width = format or "16 bits"
        label = f"{method}, {width}" + ("" if rank is None else f", r = {rank}")
        handles.append(Line2D([], [], label=label, **look))
    return handles
