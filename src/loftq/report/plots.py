"""The figures of a page: plain data in, one inline SVG out.

Drawn for a column of a phone (WIDTH inches), where they stand one below the other; wider screens
set them side by side. Colours are names of the page's style sheet, so that a figure follows the
reader's light or dark theme; text stays text.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from typing import TYPE_CHECKING, Any

from loftq.integrations.metrics import Metrics
from loftq.report.grid import ErrorGrid
from loftq.report.spectra import Spectrum
from loftq.units import size

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

WIDTH = 4.6
"""Inches; at 72 points each about the width of a phone's screen in CSS pixels."""
# What matplotlib draws with -> the variable of the style sheet that stands there in the page.
INK, MUTED, LINE = "#010101", "#020202", "#030303"
BLUE, ORANGE, GREEN = "#040404", "#050505", "#060606"
VARIABLES = {
    INK: "var(--ink)", MUTED: "var(--muted)", LINE: "var(--line)",
    BLUE: "var(--blue)", ORANGE: "var(--orange)", GREEN: "var(--green)",
}  # fmt: skip
STYLE = {
    "svg.fonttype": "none", "svg.hashsalt": "loftq", "font.size": 10.5, "font.family": "sans-serif",
    "text.color": INK, "axes.labelcolor": INK, "axes.edgecolor": MUTED, "axes.linewidth": 0.8,
    "xtick.color": MUTED, "xtick.labelcolor": INK, "ytick.color": MUTED, "ytick.labelcolor": INK,
    "grid.color": LINE, "grid.linewidth": 0.8, "axes.spines.top": False,
    "axes.spines.right": False, "axes.grid.axis": "y", "lines.linewidth": 1.6,
    "legend.frameon": False, "legend.fontsize": 10.5, "figure.facecolor": "none",
    "axes.facecolor": "none", "savefig.facecolor": "none", "axes.axisbelow": True,
}  # fmt: skip
CELL = 0.16  # inches of a block in the heat map


@dataclass(frozen=True, kw_only=True)
class Drawing:
    """One figure of the page."""

    name: str
    """Its id in the page."""
    caption: str
    svg: str


def bytes_drawing(sizes: Mapping[str, int]) -> Drawing:
    """Stored bytes of the model against its source.

    Args:
        sizes: `InspectReport.bytes`.
    """
    rows = [("source, stored", [(sizes["source"], MUTED)])] if sizes["source"] else []
    rows.append(("source, 16 bits", [(sizes["source_at_16_bits"], MUTED)]))
    parts = [(sizes["packed"], BLUE), (sizes["unquantized"], ORANGE), (sizes["adapter"], GREEN)]
    rows.append(("this model", parts))
    with _style():
        figure, axes = _figure(height=0.5 * len(rows) + 1.1)
        _stacked(axes, rows)
        _legend(figure, [("packed", BLUE), ("unquantized", ORANGE), ("adapter", GREEN)])
        _bytes_axis(axes, max(sizes["source"], sizes["source_at_16_bits"], sizes["model"]))
        axes.set_xlabel("stored weights (decimal units)")
    share = sizes["model"] / max(1, sizes["source_at_16_bits"])
    caption = (
        f"Bytes of all weights. This model takes {size(sizes['model'])}, {share:.0%} of the same "
        f"parameters at 16 bits."
    )
    return _drawing(figure, "bytes", caption)


def error_drawings(grid: ErrorGrid) -> tuple[Drawing, Drawing]:
    """Relative error of each layer, before and after, in the same colours."""
    found = [x for rows in (grid.plain, grid.adapted) for row in rows for x in row if x is not None]
    finite = [x for x in found if math.isfinite(x)] or [0.0]
    span = (min(finite), max(*finite, min(finite) + 1e-6))
    before = "Rounding alone, W − q(W): relative error of each layer."
    after = "With the start adapter, W − Q − s·BA: the same layers on the same scale."
    return (
        _error_map(grid, grid.plain, span, "error-before", before),
        _error_map(grid, grid.adapted, span, "error-after", after),
    )


def spectrum_drawing(spectrum: Spectrum, number: int) -> Drawing:
    """Singular values of one layer's residuals."""
    with _style():
        figure, axes = _figure(height=3.1)
        for values, label, color, dash in (
            (spectrum.plain, "W − q(W), rounding alone", MUTED, (0, (4, 2))),
            (spectrum.backbone, "W − Q, backbone alone", ORANGE, "solid"),
            (spectrum.adapted, "W − Q − s·BA, with the adapter", BLUE, "solid"),
        ):
            axes.plot(range(1, len(values) + 1), values, color=color, label=label, ls=dash)
        axes.axvline(spectrum.rank, color=LINE, lw=1)
        axes.annotate(
            f"rank {spectrum.rank}",
            (spectrum.rank, 0),
            (3, 3),
            textcoords="offset points",
            color=MUTED,
        )
        axes.set(xlabel="index of the singular value", ylabel="σ / ‖W‖ (no unit)")
        axes.set_ylim(bottom=0)
        axes.grid(axis="y")
        axes.legend(loc="upper right")
    errors = [math.hypot(*values) for values in (spectrum.plain, spectrum.adapted)]
    caption = (
        f"{spectrum.module}. The root of the sum of squares is the relative error: "
        f"{errors[0]:.4f} rounded, {errors[1]:.4f} with the adapter."
    )
    return _drawing(figure, f"spectrum-{number}", caption)


def loss_drawing(metrics: Metrics, unit: str) -> Drawing:
    """Training and validation loss over the steps; `unit` is what a loss counts."""
    from matplotlib.ticker import MaxNLocator

    with _style():
        figure, axes = _figure(height=3.1)
        train = [row for row in metrics.train if math.isfinite(row["loss"])]
        steps, losses = [row["step"] for row in train], [row["loss"] for row in train]
        axes.plot(steps, losses, color=BLUE, lw=1.2, label="training", marker=_marker(steps), ms=4)
        found = [row for row in metrics.validation if math.isfinite(row["validation_loss"])]
        if found:
            steps = [row["step"] for row in found]
            losses = [row["validation_loss"] for row in found]
            axes.plot(steps, losses, color=ORANGE, marker="o", ms=4, label="validation")
        best = metrics.best
        if best is not None:
            at = (best["step"], best["validation_loss"])
            axes.plot(*at, marker="o", ms=9, mfc="none", mec=ORANGE, ls="none", label="best")
        axes.set(xlabel="optimizer steps", ylabel=f"loss ({unit})")
        axes.grid(axis="y")
        axes.legend(loc="upper right")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    over = "pairs" if unit.endswith("pair") else "trained tokens"
    caption = f"Loss while training: mean over the {over}."
    if best is not None:
        caption += f" Best validation loss {best['validation_loss']:.4f} at step {best['step']:g}."
    return _drawing(figure, "loss", caption)


def memory_drawing(parts: Mapping[str, int], measured: int | None) -> Drawing:
    """The predicted peak by part, and the whole beside the measured peak."""
    total = sum(parts.values())
    shown = {name: value for name, value in parts.items() if value}
    rows = [(name.replace("_", " "), [(value, BLUE)]) for name, value in shown.items()]
    rows.append(("predicted peak", [(total, ORANGE)]))
    if measured is not None:
        rows.append(("measured peak", [(measured, GREEN)]))
    with _style():
        figure, axes = _figure(height=0.29 * len(rows) + 0.75)
        _stacked(axes, rows)
        _bytes_axis(axes, max(total, measured or 0))
        axes.set_xlabel("memory while training (decimal units)")
    caption = f"Memory by part. Predicted peak {size(total)}"
    if measured is None:
        return _drawing(figure, "memory", f"{caption}; the peak was not measured.")
    gap = f"{abs(total / measured - 1):.1%} {'over' if total > measured else 'under'} it"
    caption += f", measured {size(measured)}: the prediction is {gap}."
    return _drawing(figure, "memory", caption)


def _error_map(
    grid: ErrorGrid,
    values: Sequence[Sequence[float | None]],
    span: tuple[float, float],
    name: str,
    caption: str,
) -> Drawing:
    import numpy as np
    from matplotlib import colormaps

    cells = np.array([[math.nan if x is None else x for x in row] for row in values], dtype=float)
    with _style():
        figure, axes = _figure(height=CELL * len(grid.blocks) + 1.9)
        colors = colormaps["cividis"].copy()
        mesh = axes.pcolormesh(
            cells, cmap=colors, vmin=span[0], vmax=span[1], edgecolors="face", lw=0.2
        )
        axes.invert_yaxis()
        axes.xaxis.tick_top()
        axes.set_xticks([i + 0.5 for i in range(len(grid.kinds))], grid.kinds)
        axes.tick_params(axis="x", rotation=45, length=0)
        for label in axes.get_xticklabels():
            label.set(ha="left", va="bottom", rotation_mode="anchor")
        step = max(1, len(grid.blocks) // 16)
        marks = range(0, len(grid.blocks), step)
        axes.set_yticks([i + 0.5 for i in marks], [grid.blocks[i] for i in marks])
        axes.tick_params(axis="y", length=0)
        axes.set_ylabel("block")
        axes.spines[:].set_visible(False)
        bar = figure.colorbar(
            mesh, ax=axes, orientation="horizontal", shrink=0.9, aspect=30, pad=0.02,
            boundaries=np.linspace(*span, 41), ticks=_ticks(*span), format="%.3g",
        )  # fmt: skip
        bar.set_label("relative error ‖residual‖ / ‖W‖ (no unit)")
        bar.outline.set_visible(False)
    mean = float(np.nanmean(cells)) if np.isfinite(cells).any() else math.nan
    return _drawing(figure, name, f"{caption} Mean {mean:.4f}.")


def _ticks(low: float, high: float) -> list[float]:
    from matplotlib.ticker import MaxNLocator

    return [float(x) for x in MaxNLocator(5).tick_values(low, high) if low <= x <= high]


def _marker(steps: Sequence[float]) -> str:
    return "." if len(steps) < 40 else ""


def _stacked(axes: Axes, rows: Sequence[tuple[str, Sequence[tuple[int, str]]]]) -> None:
    """Horizontal bars from top to bottom; their sum stands behind each."""
    for place, (_, parts) in enumerate(rows):
        left = 0
        for value, color in parts:
            axes.barh(place, value, left=left, color=color, height=0.62)
            left += value
        axes.annotate(size(left), (left, place), (4, 0), textcoords="offset points", va="center")
    axes.set_yticks(range(len(rows)), [name for name, _ in rows])
    axes.tick_params(axis="y", length=0)
    axes.spines["left"].set_visible(False)
    axes.invert_yaxis()


def _bytes_axis(axes: Axes, top: float) -> None:
    from matplotlib.ticker import FuncFormatter, MaxNLocator

    axes.set_xlim(0, 1.28 * max(top, 1))  # room for the number behind the longest bar
    axes.xaxis.set_major_locator(MaxNLocator(4))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: size(value) if value else "0"))


def _legend(figure: Figure, entries: Sequence[tuple[str, str]]) -> None:
    from matplotlib.patches import Patch

    handles = [Patch(color=color, label=label) for label, color in entries]
    figure.legend(handles=handles, loc="outside upper center", ncols=len(handles))


def _style() -> Any:
    import matplotlib

    return matplotlib.rc_context(STYLE)


def _figure(*, height: float) -> tuple[Figure, Axes]:
    """A figure of our own: pyplot's global list of figures is never touched."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(WIDTH, height), layout="constrained")
    return figure, figure.add_subplot()


def _drawing(figure: Figure, name: str, caption: str) -> Drawing:
    import io

    stream = io.StringIO()
    with _style():
        figure.savefig(stream, format="svg", metadata=dict.fromkeys(("Date", "Creator", "Type")))
    return Drawing(name=name, caption=caption, svg=_inline(stream.getvalue(), name, caption))


def _inline(svg: str, name: str, caption: str) -> str:
    """The <svg> element alone, named for screen readers, its ids unique in the page."""
    svg = svg[svg.index("<svg") :]
    # Its style element would style the whole page; the page's own sheet says the same of figures.
    svg = re.sub(r"<(metadata|style)\b.*?</\1>", "", svg, flags=re.DOTALL)
    svg = re.sub(r'(id="|href="#|url\(#)', rf"\g<1>{name}-", svg)
    for color, variable in VARIABLES.items():
        svg = svg.replace(color, variable)
    svg = re.sub(r"font-family: [^;\"]*;? ?", "", svg)
    begin, end = re.match(r"<svg[^>]*>", svg).span()  # type: ignore[union-attr]
    box = re.search(r'viewBox="([^"]*)"', svg)[1]  # type: ignore[index]
    width, height = box.split()[2:]
    head = (
        f'<svg viewBox="{box}" width="{width}" height="{height}" role="img" '
        f'aria-labelledby="{name}-title" xmlns="http://www.w3.org/2000/svg" '
        'xmlns:xlink="http://www.w3.org/1999/xlink">'
        f'<title id="{name}-title">{escape(caption)}</title>'
    )
    assert begin == 0
    return head + svg[end:]
