"""`loftq train`: your data and a model in, a trained adapter out."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from loftq.cli import console, options

if TYPE_CHECKING:
    from rich.console import Console

    from loftq.cli.finish import Finish
    from loftq.tasks.result import TaskResult
    from loftq.train.result import TrainResult

INTERRUPTED = 130
PREFERRED = ("vllm", "llama.cpp", "transformers")
"""Engines, the one to name first; all are named by `loftq plan`."""
NAMED = {"model": str, "data": str | None, "validation": str | None, "task": str | None}
"""Arguments that a config file may hold too."""
PLACES = {"device": str | None, "cache": str | None, "memory": str | None}


def train(
    model: Annotated[
        str,
        typer.Argument(
            metavar="MODEL",
            help="OUT of `quantize`, RUN of `train` (goes on from its adapter), or a "
            "full-precision model, which is quantized first.",
        ),
    ],
    output: Annotated[
        Path, typer.Option("-o", "--output", help="Folder of the run; the same command resumes.")
    ],
    settings: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="KEY=VALUE",
            help="Anything else: learning_rate=1e-4 epochs=2 max_length=512 batch_size=2 ...",
        ),
    ] = None,
    data: Annotated[
        str | None,
        typer.Option(help="File, folder or hub id: chats, prompts, text or preferences."),
    ] = None,
    validation: Annotated[
        str | None, typer.Option(help="Held-out data. Default: 5 % of --data.")
    ] = None,
    task: Annotated[
        str | None,
        typer.Option(
            help="A published task in place of --data: rte, squad, gsm8k, ... (docs/tasks.md). "
            "--data is then the folder of the tasks' files; --method full and lora16 train the "
            "original model."
        ),
    ] = None,
    bits: options.Bits = None,
    format: options.Format = None,
    method: options.Method = None,
    rank: options.Rank = None,
    alpha: options.Alpha = None,
    targets: options.Targets = None,
    skip: options.Skip = None,
    engine: options.Engine = None,
    device: Annotated[
        str | None, typer.Option(help="cpu or cuda. Default: the GPU if any.")
    ] = None,
    seed: options.Seed = None,
    config: options.ConfigFile = None,
    memory: Annotated[
        str | None,
        typer.Option(help="Size of the card, such as 8GB: what is left open is chosen to fit."),
    ] = None,
    report_to: Annotated[
        str | None, typer.Option(help="Also log to tensorboard, wandb or trackio.")
    ] = None,
    allow_uncovered: options.AllowUncovered = False,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace what an earlier run left in the folder.")
    ] = False,
    push_to_hub: options.PushToHub = None,
    as_json: options.AsJson = False,
) -> None:
    """Fine-tune the adapter of MODEL on --data; the same command again goes on after a stop."""
    flags = {
        "data": data, "validation": validation, "task": task, "bits": bits, "format": format,
        "method": method, "rank": rank, "alpha": alpha, "targets": targets, "skip": skip,
        "engine": engine, "device": device, "seed": seed, "memory": memory, "report_to": report_to,
        "allow_uncovered": allow_uncovered,
    }  # fmt: skip
    main = os.environ.get("RANK", "0") == "0"
    out = console.screen(as_json=as_json or not main)
    with console.answering(as_json=as_json):
        from loftq.cli.finish import Finish
        from loftq.cli.train_screen import TrainScreen
        from loftq.cli.train_task import task_types, train_on_task
        from loftq.train.options import option_types
        from loftq.train.run import train as run

        known = {**task_types(), **option_types(), **NAMED, **PLACES, **options.AFTER_KEYS}
        request = options.collect(flags, settings, config, known)
        chosen = {key: value for key, value in request.options.items() if key != "model"}
        named = chosen.pop("task", None)
        if named is None and "data" not in chosen:
            raise typer.BadParameter("give the training data with --data FILE, or a --task.")
        finish = Finish(output, request.after, push_to_hub if main else None)
        screen = TrainScreen(out, console.side_screen())
        out.print(f"train: {model} on {named or chosen['data']} -> {output}")
        where: Any = {"overwrite": overwrite, "listener": screen}
        result: TrainResult | TaskResult
        try:
            if named is not None:
                result = train_on_task(model, named, output, **where, **chosen)
            else:
                result = run(model, chosen.pop("data"), output, **where, **chosen)
        except KeyboardInterrupt:
            screen.close()
            again = "the same command without --overwrite" if overwrite else "the same command"
            typer.echo(f"interrupted; {again} continues {output}.", err=True)
            raise typer.Exit(INTERRUPTED) from None
        finally:
            screen.close()
        if not main:
            return
        if not result.already_finished:
            finish.write_page()
        finish.push()
    if as_json:
        console.emit({"model": model, **result.to_dict(), **finish.to_dict()})
    else:
        _print_end(out, output, result, finish)


def _print_end(
    out: Console, output: Path, result: TrainResult | TaskResult, finish: Finish
) -> None:
    found = result.summary
    lines = console.facts()
    if result.already_finished:
        out.print(f"{output}: finished before with these settings; --overwrite trains again.")
    took = f"{console.count(found['steps'], 'step')} in {console.duration(found['seconds'])}"
    if found["stopped_early"]:
        took += ", stopped early: the validation loss rose"
    lines.add_row("done", took)
    lines.add_row("loss", *_losses(found))
    peak = result.memory.get("measured_peak")
    if peak is not None:
        lines.add_row("memory", f"{console.size(peak)} at the peak", _memory_note(found))
    if graphs := found.get("graphs"):
        batches = f"{graphs['replayed']} of {graphs['replayed'] + graphs['eager']} batches"
        lines.add_row("graphs", f"{batches} from {console.count(graphs['captured'], 'graph')}")
    if "task" in found:
        from loftq.cli.train_task import add_end

        add_end(lines, output, result)
        finish.add_rows(lines)
        out.print(lines)
        return
    lines.add_row("wrote", f"{output / 'adapter'}", "the best checkpoint by validation loss")
    finish.add_rows(lines)
    lines.add_row("next", f"loftq chat {output}")
    lines.add_row("", f"loftq export {output} {way_out(output)} -o SERVED")
    out.print(lines)


def way_out(output: Path) -> str:
    """Flag of an export that the format of a run admits: an engine that holds it, else dense."""
    from loftq.integrations.export import readers

    held = readers(output)
    first = next((engine for engine in PREFERRED if engine in held), None)
    return "--to dense" if first is None else f"--for {first}"


def _losses(found: Any) -> tuple[str, str]:
    best, first = found["best_validation_loss"], found["first_validation_loss"]
    if best is None:
        return f"{found['final_loss']:.4f} in training", "nothing was held out"
    return (
        f"{first:.4f} -> {best:.4f} on held-out rows",
        f"best at step {found['best_step']}; {found['final_loss']:.4f} in training at the end",
    )


def _memory_note(found: Any) -> str:
    if str(found["device"]).startswith("cuda"):
        return "allocated by torch; the CUDA context comes on top"
    return "anonymous memory, above Python and its libraries"
