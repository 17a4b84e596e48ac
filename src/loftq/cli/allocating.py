"""How `loftq plan` shows what a measured allocation chose: layer by layer, and against rivals."""

from __future__ import annotations

from typing import TYPE_CHECKING

from loftq.cli import console

if TYPE_CHECKING:
    from rich.console import Console

    from loftq.pipeline.plan import Plan


def show(out: Console, plan: Plan) -> None:
    """Print the chosen widths (and ranks) by block, and the cost beside that of simpler choices."""
    choice = plan.choice
    assert choice is not None
    _print_widths(out, plan)
    shown = console.table("spent on", "bits", "bytes", choice.allocation, right=("bits", "bytes"))
    rows = [("this choice", choice.nbytes, choice.cost)]
    rows += [(rival.name, rival.nbytes, rival.cost) for rival in choice.rivals]
    for name, nbytes, cost in rows:
        bits = 8 * nbytes / choice.weights
        shown.add_row(name, f"{bits:.3f}", console.size(nbytes), f"{cost:.6g}")
    out.print(shown)
    counted = "scales and 16-bit adapters" if choice.ranks else "scales"
    out.print(
        f"Sums of measured costs; at most {8 * choice.budget / choice.weights:.3f} bits a weight, "
        f"{counted} included.",
        style="dim",
    )
    out.print()


def _print_widths(out: Console, plan: Plan) -> None:
    """A row for each kind of layer: the bits of each block, in their order."""
    widths: dict[str, list[str]] = {}
    assert plan.choice is not None
    for layer in plan.layers:
        if layer.info.module in plan.choice.formats:
            kind = layer.info.module.rsplit(".", 1)[-1]
            rank = f"/{layer.rank}" if plan.choice.ranks else ""
            widths.setdefault(kind, []).append(f"{layer.spec.bits}{rank}")
    what = "bits/rank" if plan.choice.ranks else "bits"
    shown = console.table("layer", f"{what} of each, from the first block to the last")
    for kind, bits in widths.items():
        shown.add_row(kind, " ".join(bits))
    out.print(shown)
    out.print()
