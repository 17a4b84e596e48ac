"""`loftq lab`: experiments and what they are made of."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from loftq.cli import console, options
from loftq.cli.compare import compare
from loftq.cli.ensemble import ensemble

app = typer.Typer(
    help="Experiments: the demo, the methods that tables compare, recipes of `train`.",
    no_args_is_help=True,
    rich_markup_mode=None,
)


app.command(short_help="Methods side by side: trained, with spread and bytes.")(compare)

app.command(short_help="Several adapters on one backbone, their predictions averaged.")(ensemble)


@app.command(short_help="List all methods, reproductions included.")
def methods(as_json: options.AsJson = False) -> None:
    """List all methods, reproductions of papers included, with their choices."""
    with console.answering(as_json=as_json):
        from loftq.methods import METHODS

    if as_json:
        console.emit({"methods": [asdict(method) for method in METHODS.values()]})
        return
    shown = console.table(
        "method",
        "paper",
        "needs",
        "rounding",
        "metric",
        "T",
        "schedule",
        "keeps",
        "solver",
        "refine",
        "about",
    )
    for method in METHODS.values():
        shown.add_row(
            method.name + (" (reproduction)" if method.reproduction else ""),
            f"arXiv:{method.paper}" if method.paper else "ours",
            method.needs,
            method.rounding,
            method.metric,
            str(method.iterations),
            method.order if method.schedule == "alternate" else method.schedule,
            method.keep,
            method.solver if method.correction == "closed-form" else method.correction,
            method.refinement,
            method.summary,
        )
    out = console.screen()
    out.print(shown)
    out.print(
        "Every method takes every format. Keys override a choice: iters=, order=, solver=, "
        "scale_fit=, damping=, design_rank=, refine=, refine_epochs=.",
        style="dim",
    )


@app.command(short_help="One table on a small real model, in minutes.")
def demo(
    model: Annotated[
        str | None,
        typer.Option(help="Folder or hub id; default: a small model that needs no hub."),
    ] = None,
    as_json: options.AsJson = False,
) -> None:
    """Quantize a small real model several ways, tune it for a few steps, show one table."""
    from loftq.lab.demo import run_demo

    run_demo(model=model, as_json=as_json)


@app.command(short_help="List the recipes of `train`, or copy one.")
def recipes(
    name: Annotated[str | None, typer.Argument(metavar="NAME", help="Recipe to copy.")] = None,
    output: Annotated[
        Path, typer.Option("-o", "--output", help="Folder or file to copy it to.")
    ] = Path("."),
    as_json: options.AsJson = False,
) -> None:
    """List the recipes of `loftq train`, or copy one to edit: `loftq train ... --config FILE`."""
    from loftq.lab import cookbook

    known = cookbook.recipes()
    copied = None if name is None else cookbook.copy_recipe(name, output)
    if as_json:
        purposes = {key: cookbook.purpose(text) for key, text in known.items()}
        console.emit({"recipes": purposes, "copied": copied and str(copied)})
        return
    out = console.screen()
    if copied is not None:
        out.print(f"{copied}: edit it, then loftq train MODEL --config {copied} --data FILE -o RUN")
        return
    lines = console.facts()
    for key, text in known.items():
        lines.add_row(key, cookbook.purpose(text))
    out.print(lines)
    out.print("loftq lab recipes NAME copies one here.", style="dim")
