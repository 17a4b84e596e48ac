"""`loftq quantize`: a pretrained model in, a packed backbone with its start adapter out."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from loftq.cli import console, options

if TYPE_CHECKING:
    from rich.console import Console

    from loftq.cli.choices import Choice
    from loftq.cli.finish import Finish
    from loftq.pipeline.plan import Plan
    from loftq.pipeline.run import RunResult

INTERRUPTED = 130


def quantize(
    model: options.Model,
    output: Annotated[
        Path, typer.Option("-o", "--output", help="Folder to make; the same command resumes.")
    ],
    settings: options.Settings = None,
    bits: options.Bits = None,
    allocation: options.Allocation = None,
    rotation: options.Rotation = None,
    format: options.Format = None,
    method: options.Method = None,
    rank: options.Rank = None,
    alpha: options.Alpha = None,
    data: options.Data = None,
    targets: options.Targets = None,
    skip: options.Skip = None,
    engine: options.Engine = None,
    device: options.Device = None,
    seed: options.Seed = None,
    config: options.ConfigFile = None,
    allow_uncovered: options.AllowUncovered = False,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace a finished output of loftq.")
    ] = False,
    push_to_hub: options.PushToHub = None,
    as_json: options.AsJson = False,
) -> None:
    """Quantize MODEL: packed weights, the LoRA start that belongs to them, a record per layer."""
    flags = {
        "bits": bits, "allocation": allocation, "rotation": rotation, "format": format,
        "method": method, "rank": rank, "alpha": alpha, "data": data, "targets": targets,
        "skip": skip, "engine": engine, "device": device, "seed": seed,
        "allow_uncovered": allow_uncovered,
    }  # fmt: skip
    request = options.collect(flags, settings, config)
    out = console.screen(as_json=as_json)
    with console.answering(as_json=as_json):
        from loftq.cli.finish import Finish

        finish = Finish(output, request.after, push_to_hub)
        again = not overwrite and _is_finished(model, output, request.options)
        if again:
            finish.push()
    if again and finish.repo is not None:
        _print_pushed(out, finish)
        if as_json:
            console.emit(finish.to_dict())
        return
    with console.answering(as_json=as_json):
        from loftq import api
        from loftq.cli.choices import choices
        from loftq.cli.progress import QuantizeProgress

        follow = QuantizeProgress(out, console.side_screen())
        chosen: list[Choice] = []

        def begin(plan: Plan) -> None:
            chosen.extend(choices(plan, request.given))
            _print_start(out, model, output, plan, chosen)
            follow.start(plan)

        try:
            result = api.quantize(
                model,
                output,
                overwrite=overwrite,
                on_plan=begin,
                on_batch=follow.on_batch,
                on_block=follow.on_block,
                on_cost=follow.on_cost,
                on_refine=follow.on_refine,
                **request.options,
            )
        except KeyboardInterrupt:
            follow.close()
            typer.echo(f"interrupted; the same command continues {output}.", err=True)
            raise typer.Exit(INTERRUPTED) from None
        finally:
            follow.close()
        follow.announce()
        finish.write_page()
        finish.push()
    if as_json:
        answer = _answer(model, output, result, chosen, follow.resumed)
        console.emit({**answer, **finish.to_dict()})
    else:
        _print_end(out, output, result, finish)


def _print_start(out: Console, model: str, output: Path, plan: Plan, chosen: list[Choice]) -> None:
    from loftq.pipeline.serving import where_served

    out.print(f"quantize: {model} ({plan.layout.architecture}) -> {output}")
    lines = console.facts()
    for choice in chosen:
        lines.add_row(choice.name, choice.value, choice.reason)
    size, seconds = console.size(plan.disk_bytes), console.duration(plan.seconds)
    refining = plan.refinement_seconds
    more = f", and {console.duration(refining)} to refine" if refining else ""
    lines.add_row(
        "output", size, f"estimated time to solve: {seconds}{more}; `loftq plan` says more"
    )
    places = where_served(plan)
    exact = [place.engine for place in places if place.exact]
    lines.add_row("serves", ", ".join(exact), "layouts that hold it without loss")
    out.print(lines)


def _print_end(out: Console, output: Path, result: RunResult, finish: Finish) -> None:
    from loftq.integrations.artifact import totals

    sums = totals(result)
    lines = console.facts()
    lines.add_row(
        "done",
        f"{console.count(len(result.records), 'layer')} in "
        f"{console.duration(result.timings['total'])}: mean relative error "
        f"{sums['mean_plain_error']:.4f} rounded, {sums['mean_error']:.4f} with the adapter",
    )
    for stage in result.refinement:
        units = stage["units"]
        before, after = (sum(unit[key] for unit in units) / len(units) for key in ("start", "best"))
        lines.add_row(
            "refined",
            f"{console.count(len(units), stage['scope'])}: held-out loss {before:.4g} -> "
            f"{after:.4g} (mean)",
        )
    if told := _rotated(result):
        lines.add_row("rotated", told)
    if noted := _noted(result):
        lines.add_row("noted", noted)
    lines.add_row(
        "wrote",
        f"{output}: {console.size(sums['packed_bytes'])} packed + "
        f"{console.size(sums['unquantized_bytes'])} unquantized + "
        f"{console.size(sums['adapter_bytes'])} adapter; the source has "
        f"{console.size(sums['source_bytes'])}",
    )
    finish.add_rows(lines)
    lines.add_row("next", f"loftq inspect {output} --check")
    lines.add_row("", f"loftq train {output} --data FILE -o RUN")
    lines.add_row("", f'in Python: loftq.load("{output}", trainable=True)')
    out.print(lines)


def _rotated(result: RunResult) -> str:
    """How many of the layers that rotation=auto tried are rotated; "" where it tried none."""
    tried = [layer for layer in result.plan.layers if layer.rival]
    if not tried:
        return ""
    turned = sum(result.formats[layer.info.module] == str(layer.rival) for layer in tried)
    return f"{turned} of {console.count(len(tried), 'layer')}, whose error is smaller so"


def _noted(result: RunResult) -> str:
    """Layers that did not go the plain way, the first of them in words; "" without any."""
    refined = f"refined: {result.plan.config.refinement().name}"
    notes = {x["name"]: [note for note in x["notes"] if note != refined] for x in result.records}
    marked = [f"{name}: {'; '.join(found)}" for name, found in notes.items() if found]
    if not marked:
        return ""
    rest = f"; {len(marked) - 1} more in the report" if len(marked) > 1 else ""
    return f"{marked[0]}{rest}"


def _print_pushed(out: Console, finish: Finish) -> None:
    lines = console.facts()
    lines.add_row("quantize", f"{finish.folder} was finished before with these settings")
    finish.add_rows(lines)
    out.print(lines)


def _is_finished(model: str, output: Path, chosen: Mapping[str, Any]) -> bool:
    """Whether `output` is what this very command made before, so that it only is to be pushed."""
    from loftq.cli.finish import read_record
    from loftq.pipeline.config import QuantizeConfig

    record = read_record(output)
    if record is None or record["source"]["name"] != model:
        return False
    known = {field.name for field in fields(QuantizeConfig)}
    config = QuantizeConfig(**{key: value for key, value in chosen.items() if key in known})
    return QuantizeConfig.from_dict(record["config"]) == config


def _answer(
    model: str, output: Path, result: RunResult, chosen: list[Choice], resumed: int
) -> dict[str, Any]:
    from loftq.integrations.artifact import totals

    return {
        "model": model,
        "output": str(output),
        "choices": [choice.to_dict() for choice in chosen],
        "config": result.plan.config.to_dict(),
        "device": result.plan.device,
        "totals": totals(result),
        "disk_bytes": result.plan.disk_bytes,
        "backbone": result.backbone,
        "resumed_layers": resumed,
        "seconds": result.timings["total"],
        "layers": [dict(record) for record in result.records],
    }
