"""`loftq plan`: what `loftq quantize` would do; reads headers only, unless it is to measure."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from loftq.cli import allocating, console, fitting, options

if TYPE_CHECKING:
    from rich.console import Console

    from loftq.report import PlanReport


def plan(
    model: options.Model,
    settings: options.Settings = None,
    output: Annotated[
        Path | None, typer.Option("-o", "--output", help="Where it would go: compares free disk.")
    ] = None,
    bits: options.Bits = None,
    allocation: options.Allocation = None,
    rotation: options.Rotation = None,
    format: options.Format = None,
    method: options.Method = None,
    rank: options.Rank = None,
    alpha: options.Alpha = None,
    targets: options.Targets = None,
    skip: options.Skip = None,
    engine: options.Engine = None,
    device: options.Device = None,
    seed: options.Seed = None,
    config: options.ConfigFile = None,
    memory: Annotated[
        str | None,
        typer.Option(help="Choose everything so that training fits a card: 8GB, 7.5GiB, ..."),
    ] = None,
    data: Annotated[
        str | None,
        typer.Option(
            help="Text to calibrate on, for methods that need it; with --memory the training data: "
            "its longest row and its tokens."
        ),
    ] = None,
    measure: Annotated[
        bool,
        typer.Option(
            "--measure", help="Read the weights too and measure the costs that --allocation needs."
        ),
    ] = False,
    allow_uncovered: options.AllowUncovered = False,
    as_json: options.AsJson = False,
) -> None:
    """Say what quantizing MODEL would take and give: bits, bytes, memory, time, where it serves."""
    flags = {
        "bits": bits, "allocation": allocation, "rotation": rotation, "format": format,
        "method": method, "rank": rank, "alpha": alpha, "data": data, "targets": targets,
        "skip": skip, "engine": engine, "device": device, "seed": seed,
        "allow_uncovered": allow_uncovered,
    }  # fmt: skip
    known = None if memory is None else {**_training_keys(), **options.keys()}
    request = options.collect(flags, settings, config, known)
    with console.answering(as_json=as_json):
        from loftq import api
        from loftq.cli.choices import choices
        from loftq.cli.progress import QuantizeProgress
        from loftq.report import describe_plan

        training, settled, given = None, dict(request.options), request.given
        if memory is not None:
            rows = settled.pop("data", None)  # of the training, not of a calibration
            training, quantize = fitting.within(model, memory, rows, settled)
            settled = quantize | {k: v for k, v in settled.items() if k in fitting.ELSEWHERE}
            given -= {"data"}
        follow = QuantizeProgress(console.screen(as_json=as_json), console.side_screen())
        try:
            planned = api.plan(
                model,
                measure=measure,
                on_block=follow.on_block,
                on_cost=follow.on_cost,
                **settled,
            )
        finally:
            follow.close()
        report = describe_plan(planned)
        chosen = choices(planned, given)
        free = None if output is None else _free(output)
    if as_json:
        made: dict[str, object] = {
            "choices": [choice.to_dict() for choice in chosen],
            "free_disk_bytes": free,
        }
        if training is not None:
            made["training"] = training.to_dict()
        console.emit({"model": model, **report.to_dict(), **made})
        return
    out = console.screen()
    out.print(f"plan: {model} ({report.architecture})")
    lines = console.facts()
    for choice in chosen:
        lines.add_row(choice.name, choice.value, choice.reason)
    out.print(lines)
    out.print()
    _print_layers(out, report)
    if planned.choice is not None:
        allocating.show(out, planned)
    _print_totals(out, report)
    if training is not None:
        fitting.show(out, training)
    if free is not None and free < report.disk_bytes:
        out.print(
            f"\n{output}: {console.size(free)} free, {console.size(report.disk_bytes)} needed. "
            "Free some space or choose another disk."
        )


def _training_keys() -> dict[str, Any]:
    from loftq.train.options import option_types

    return option_types()


def print_serving(out: Console, report: PlanReport) -> None:
    """Where the backbone can be served, one line per engine."""
    lines = console.facts()
    for place in report.serving:
        lines.add_row("serves" if place.exact else "not", place.engine, place.note)
    out.print(lines)
    out.print(
        "A layout that serves holds the same codes and scales without loss: a property of the "
        "format. What is written is loftq's own layout.",
        style="dim",
    )


def _print_layers(out: Console, report: PlanReport) -> None:
    right = ("layers", "weights", "bits", "bytes")
    shown = console.table("layer", "shape", "format", *right, right=right)
    for group in report.groups:
        rows, columns = group.shape
        shown.add_row(
            group.name,
            f"{rows} x {columns}",
            group.format,
            str(group.layers),
            f"{group.weights:,}",
            f"{group.bits_per_weight:.3f}",
            console.size(group.packed_bytes),
        )
    out.print(shown)
    out.print()


def _print_totals(out: Console, report: PlanReport) -> None:
    lines = console.facts()
    for kept in report.kept:
        more = f" and {kept.modules - 1} more" if kept.modules > 1 else ""
        remark = kept.reason if kept.by_choice else f"{kept.reason}: cannot be packed yet"
        lines.add_row("kept", f"{kept.example}{more}, {kept.parameters:,} weights", remark)
    lines.add_row(
        "bits", f"{report.bits_per_weight:.3f} per quantized weight", "scales and zeros included"
    )
    lines.add_row(
        "disk",
        console.size(report.disk_bytes),
        f"{console.size(report.packed_bytes)} packed + {console.size(report.unquantized_bytes)} "
        f"unquantized + {console.size(report.adapter_bytes)} adapter; the source has "
        f"{console.size(report.source_bytes)}, at 16 bits "
        f"{console.size(report.source_at_16_bits)}",
    )
    lines.add_row(
        "memory",
        f"{console.size(report.loaded_bytes)} on the device when loaded",
        "weights and adapter as stored; activations come on top",
    )
    lines.add_row(
        "",
        f"{console.size(report.host_bytes)} of host memory while quantizing",
        f"above Python and its libraries; {console.size(report.solve_bytes)} on {report.device} "
        "for the largest batch",
    )
    lines.add_row(
        "time",
        f"{console.duration(report.seconds)} on {report.device}",
        "a rough estimate of the solve; reading and writing come on top",
    )
    if report.calibration is not None:
        cost = report.calibration
        lines.add_row(
            "calibrate",
            f"{console.duration(cost['seconds'])}, {console.size(cost['device_bytes'])} on "
            f"{report.device}",
            f"estimates; {_kept(cost)}",
        )
    if report.refinement_seconds:
        lines.add_row(
            "refine",
            f"{console.duration(report.refinement_seconds)} on {report.device}",
            "a rough estimate of the gradient steps; small models on a GPU take longer",
        )
    out.print(lines)
    print_serving(out, report)


def _kept(cost: Mapping[str, Any]) -> str:
    """What becomes of the statistics."""
    if not cost["disk_bytes"]:
        return "taken layer after layer while these are solved, for this run alone"
    size = console.size(cost["disk_bytes"])
    return f"{size} of statistics in {cost['folder']}, used again by other methods and widths"


def _free(output: Path) -> int:
    import shutil

    place = output.absolute()
    while not place.is_dir() and place != place.parent:
        place = place.parent
    return shutil.disk_usage(place).free
