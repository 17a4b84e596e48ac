"""Confidence against accuracy: the reliability diagram of members and ensemble."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from loftq.lab.compare.picture import COLORS, drawn
from loftq.lab.ensemble.result import EnsembleResult

if TYPE_CHECKING:
    from matplotlib.axes import Axes

SIZE = (7.4, 3.9)  # inches


def draw_reliability(found: EnsembleResult, path: Path) -> Path:
    """Write the picture; its kind follows the name's end (.svg, .png).

    Accuracy of the rows in each interval of confidence, for the ensemble and for all members
    together: on the diagonal probabilities mean what they say. Below, how many rows there are.

    Raises:
        ValueError: no matplotlib.
    """
    panels = (
        (f"mean of {len(found.members)} members", found.member_diagram, COLORS[6],
         sum(member.ece for member in found.members) / len(found.members)),
        ("ensemble", found.diagram, COLORS[0], found.ensemble.ece),
    )  # fmt: skip
    with drawn(path, SIZE) as figure:
        rows = figure.subplots(2, 2, sharex=True, sharey="row", height_ratios=(3, 1))
        for place, (name, bars, color, missed) in enumerate(panels):
            _accuracy(rows[0, place], bars, color, f"{name}: ECE {100 * missed:.1f} %")
            _rows(rows[1, place], bars, color)
        rows[0, 0].set_ylabel("accuracy")
        rows[1, 0].set_ylabel("share of rows")
        figure.suptitle(f"{found.task} ({found.split}, {found.rows} rows)", fontsize=10.5)
    return path


def _accuracy(axes: Axes, bars: Sequence[Mapping[str, Any]], color: str, title: str) -> None:
    axes.plot([0, 1], [0, 1], color="#b0b0b0", lw=1, ls="--", zorder=1)
    for bar in bars:
        axes.bar(bar["low"], bar["accuracy"], _width(bar), align="edge", color=color, alpha=0.75)
    means = [bar["confidence"] for bar in bars], [bar["accuracy"] for bar in bars]
    axes.plot(*means, marker="o", ms=3.5, lw=1, color="black")
    axes.set(xlim=(0, 1), ylim=(0, 1))
    axes.set_title(title, fontsize=10)


def _rows(axes: Axes, bars: Sequence[Mapping[str, Any]], color: str) -> None:
    total = sum(bar["rows"] for bar in bars)
    for bar in bars:
        axes.bar(bar["low"], bar["rows"] / total, _width(bar), align="edge", color=color)
    axes.set_xlabel("confidence (largest probability)")


def _width(bar: Mapping[str, Any]) -> float:
    return float(bar["high"] - bar["low"])
