"""`loftq inspect`: what an output holds, and whether it is still what was written."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from loftq.cli import console, options

if TYPE_CHECKING:
    from rich.console import Console

    from loftq.report import InspectReport

PROBLEMS_SHOWN = 20


def inspect(
    output: Annotated[
        Path, typer.Argument(metavar="OUT", help="Folder that `loftq quantize` made.")
    ],
    check: Annotated[
        bool,
        typer.Option(
            "--check", help="Read all tensors: hashes, sizes, finite scales, backbone, adapter."
        ),
    ] = False,
    source: Annotated[
        str | None,
        typer.Option(help="The model it was made from: recompute every layer's error from files."),
    ] = None,
    html: Annotated[
        Path | None,
        typer.Option(help="Write a page with figures about OUT, or about a RUN of `loftq train`."),
    ] = None,
    as_json: options.AsJson = False,
) -> None:
    """Show what OUT holds, layer by layer; --check and --source verify it (exit 1 on a problem)."""
    if html is not None:
        _write_page(output, html, source, as_json=as_json)
        if not (output / "loftq.json").is_file():  # a run: there are no layers to list
            if as_json:
                console.emit({"report": str(html)})
            return
    with console.answering(as_json=as_json):
        from loftq.cli.progress import Bar
        from loftq.report import inspect_output

        folder = None if source is None else _resolved(source)
        with Bar(console.side_screen(), "verified") as bar:
            report = inspect_output(output, check, folder, on_step=bar.update)
    if as_json:
        console.emit(report.to_dict())
    else:
        _print(console.screen(), report)
    if not report.ok:
        if not as_json:
            _complain(report)
        raise typer.Exit(1)


def _write_page(folder: Path, html: Path, source: str | None, *, as_json: bool) -> None:
    with console.answering(as_json=as_json):
        from loftq.report import write_report

        write_report(folder, output=html, source=source)
    console.screen(as_json=as_json).print(f"report: {html}")


def _resolved(source: str) -> Path:
    from loftq.integrations.discover import resolve_source

    return resolve_source(source)


def _print(out: Console, report: InspectReport) -> None:
    out.print(f"inspect: {report.folder}")
    if report.layers:
        _print_layers(out, report)
        _print_totals(out, report)
    lines = console.facts()
    for words in report.checks:
        lines.add_row("checked", words)
    if report.max_deviation is not None:
        lines.add_row("", f"largest relative deviation from the record: {report.max_deviation:.1e}")
    lines.add_row("result", "in order" if report.ok else f"{len(report.problems)} problems")
    out.print(lines)


def _print_layers(out: Console, report: InspectReport) -> None:
    recomputed = any(row.recomputed is not None for row in report.layers)
    right = ["bits", "rounded", "adapted"] + ["from files"] * recomputed
    shown = console.table("layer", "shape", "format", *right, right=tuple(right))
    for row in report.layers:
        numbers = [f"{row.bits_per_weight:.3f}", f"{row.plain_error:.4f}", f"{row.error:.4f}"]
        if recomputed:
            numbers.append("" if row.recomputed is None else f"{row.recomputed:.4f}")
        shown.add_row(row.module, f"{row.shape[0]} x {row.shape[1]}", row.format, *numbers)
    out.print(shown)
    out.print()


def _print_totals(out: Console, report: InspectReport) -> None:
    about, sizes = report.model, report.bytes
    lines = console.facts()
    lines.add_row("source", str(about["source"]))
    lines.add_row("method", f"{about['method']}, {_rank(about)}")
    lines.add_row("bits", f"{report.bits_per_weight:.3f} per quantized weight")
    lines.add_row(
        "error",
        f"{report.mean_plain_error:.4f} rounded, {report.mean_error:.4f} with the adapter",
        "relative, mean over layers",
    )
    lines.add_row(
        "bytes",
        f"{sizes['model']:,} = {sizes['packed']:,} packed + {sizes['unquantized']:,} unquantized "
        f"+ {sizes['adapter']:,} adapter",
        f"{sizes['model'] / sizes['source_at_16_bits']:.1%} of the source at 16 bits",
    )
    lines.add_row("on disk", f"{sizes['disk']:,}", "with headers, tokenizer and records")
    lines.add_row("backbone", str(about["backbone"]))
    out.print(lines)


def _rank(about: Mapping[str, Any]) -> str:
    """Rank and alpha; of layers with ranks of their own what is the same for all."""
    if len(about["ranks"]) > 1:
        return f"ranks {', '.join(map(str, about['ranks']))} by layer, scaling {about['scaling']:g}"
    return f"rank {about['rank']}, alpha {about['alpha']:g}"


def _complain(report: InspectReport) -> None:
    for problem in report.problems[:PROBLEMS_SHOWN]:
        typer.echo(f"problem: {problem}", err=True)
    more = len(report.problems) - PROBLEMS_SHOWN
    if more > 0:
        typer.echo(f"... and {more} more; --json lists all", err=True)
