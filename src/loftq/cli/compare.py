"""`loftq lab compare`: methods side by side, trained, with their spread and their bytes."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from loftq.cli import console, options

if TYPE_CHECKING:
    from rich.console import Console

    from loftq.lab.compare.cells import Cell
    from loftq.lab.compare.planned import PlannedComparison, PlannedLine
    from loftq.lab.compare.recipe import CompareRecipe
    from loftq.lab.compare.store import Row
    from loftq.lab.compare.table import Comparison

FLAGS = ("output", "methods", "tasks", "seeds", "model", "against")
"""What is easily written as a key and is none."""
OVER = "over: the model, gradients and optimizer states, without activations"
AXES = ("formats", "ranks")
"""Keys that change the matrix; all others are options of `train --task`, for every cell."""


def compare(
    recipe: Annotated[
        str | None,
        typer.Argument(metavar="RECIPE", help="A packaged comparison, or a .yaml file of yours."),
    ] = None,
    settings: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="KEY=VALUE",
            help="formats=nf2-g64,nf4-g64 ranks=16,32, and options of `train` for every cell: "
            "max_steps=100 ...",
        ),
    ] = None,
    output: Annotated[
        Path | None,
        typer.Option("-o", "--output", help="Folder; the same command goes on with it."),
    ] = None,
    methods: Annotated[
        list[str] | None,
        typer.Option(help="Methods, with options: qlora,loftq-paper:iters=1,lora16,full"),
    ] = None,
    tasks: Annotated[list[str] | None, typer.Option(help="Some of the recipe's tasks.")] = None,
    seeds: Annotated[int | None, typer.Option(help="Runs of every cell.")] = None,
    model: Annotated[
        str | None, typer.Option(help="Folder or hub id, over that of the recipe.")
    ] = None,
    against: Annotated[
        str | None, typer.Option(help="Method that the others are compared with, seed by seed.")
    ] = None,
    device: options.Device = None,
    retry: Annotated[
        bool, typer.Option("--retry", help="Train again what failed or diverged before.")
    ] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Cells, bytes and memory; trains nothing.")
    ] = False,
    table: Annotated[
        bool, typer.Option("--table", help="Only write the table of the rows that are there.")
    ] = False,
    tiny: Annotated[
        bool,
        typer.Option(
            "--tiny", help="With --dry-run: also one step a task, on a tiny random model."
        ),
    ] = False,
    as_json: options.AsJson = False,
) -> None:
    """Train the cells of a comparison (method x format x rank x task x seed) and show one table."""
    if tiny and not dry_run:
        raise typer.BadParameter("--tiny belongs to --dry-run.")
    if recipe is None:
        _list(as_json=as_json)
        return
    named = (options.split_names(given or ()) or None for given in (methods, tasks))
    axes = {**dict(zip(("methods", "tasks"), named, strict=True)), "seeds": seeds, "model": model}
    with console.answering(as_json=as_json):
        from loftq.lab.compare.recipe import load_recipe

        chosen = _changed(load_recipe(recipe), axes, settings or [])
    if dry_run:
        _dry_run(chosen, tiny=tiny, as_json=as_json)
        return
    if output is None:
        raise typer.BadParameter("give a folder for the rows and the table with -o.")
    if table:
        with console.answering(as_json=as_json):
            from loftq.lab.compare.matrix import write_tables

            found = write_tables(chosen, output, against=against)
        _answer(found, output, as_json=as_json)
        return
    _run(chosen, output, device, retry=retry, against=against, as_json=as_json)


def _list(*, as_json: bool) -> None:
    from loftq.lab.compare.recipe import known_recipes
    from loftq.lab.cookbook import purpose

    found = {name: purpose(text) for name, text in known_recipes().items()}
    if as_json:
        console.emit({"comparisons": found})
        return
    lines = console.facts()
    for name, text in found.items():
        lines.add_row(name, text)
    out = console.screen()
    out.print(lines)
    out.print("loftq lab compare NAME --dry-run says what one would take.", style="dim")


def _changed(recipe: CompareRecipe, axes: dict[str, Any], words: list[str]) -> CompareRecipe:
    from loftq.tasks.config import option_types

    known = {**option_types(), **dict.fromkeys(AXES, tuple[str, ...] | None)}
    given = dict(options.collect(dict.fromkeys(FLAGS), words, None, known).options)
    ranks = given.pop("ranks", None)
    axes |= {"formats": given.pop("formats", None)}
    try:
        axes["ranks"] = None if ranks is None else tuple(int(rank) for rank in ranks)
    except ValueError:
        raise typer.BadParameter(f"ranks={','.join(ranks)}: expected whole numbers.") from None
    return recipe.changed(options=given, **axes)


def _dry_run(recipe: CompareRecipe, *, tiny: bool, as_json: bool) -> None:
    with console.answering(as_json=as_json):
        from loftq.lab.compare.planned import plan_comparison

        planned = plan_comparison(recipe)
        steps = []
        if tiny:
            from loftq.lab.compare.rehearsal import rehearse

            steps = rehearse(recipe)
    if as_json:
        console.emit({**planned.to_dict(), "rehearsal": [step.to_dict() for step in steps]})
    else:
        out = console.screen()
        _print_plan(out, planned)
        for step in steps:
            scores = ", ".join(f"{name} {value:.3g}" for name, value in step.metrics.items())
            out.print(f"one step: {step.cell}: {scores} ({console.duration(step.seconds)})")
    if planned.problems:
        raise typer.Exit(1)


def _print_plan(out: Console, planned: PlannedComparison) -> None:
    origin = "" if planned.headers == planned.model else f" ({planned.headers})"
    out.print(f"{planned.recipe}: {planned.model}{origin}")
    tasks = ", ".join(f"{task} {number}" for task, number in planned.tasks.items())
    out.print(f"{console.count(planned.cells, 'cell')}: {tasks}")
    right = ("cells", "bits", "stored", "peak of training")
    shown = console.table("method", "format", "rank", *right, right=right)
    for entry in planned.lines:
        method, format, rank = entry.line
        shown.add_row(
            method,
            format or "16 bits",
            "" if rank is None else str(rank),
            str(entry.cells),
            "" if entry.bits_per_weight is None else f"{entry.bits_per_weight:.2f}",
            "" if entry.bytes is None else console.size(entry.bytes.total),
            _peak(entry),
        )
    out.print(shown)
    for note in dict.fromkeys(entry.note for entry in planned.lines if entry.note):
        out.print(f"{OVER}; {note}.", style="dim")
    for problem in planned.problems:
        out.print(f"cannot: {problem}")


def _peak(entry: PlannedLine) -> str:
    """The peak of a line's training, or what it lies above."""
    if entry.training_peak is not None:
        return console.size(entry.training_peak)
    return "" if entry.training_held is None else f"over {console.size(entry.training_held)}"


def _run(
    recipe: CompareRecipe,
    output: Path,
    device: str | None,
    *,
    retry: bool,
    against: str | None,
    as_json: bool,
) -> None:
    progress = console.side_screen()

    def begun(cell: Cell, place: int, total: int) -> None:
        progress.print(f"[{place} of {total}] {cell.name}", markup=False, highlight=False)

    def ended(row: Row) -> None:
        spent = console.duration(sum(row.seconds.values()))
        what = f"{row.primary} {row.value:.4f}, {spent}" if row.value is not None else row.status
        why = f": {(row.error or '').splitlines()[0]}" if row.error else ""
        progress.print(f"    {what}{why}", markup=False, highlight=False)

    with console.answering(as_json=as_json):
        from loftq.lab.compare.learner import TrainingLearner
        from loftq.lab.compare.matrix import Watcher, run_comparison

        found = run_comparison(
            recipe,
            output,
            TrainingLearner(recipe.model, device=device, headline=recipe.headline),
            retry=retry,
            against=against,
            watcher=Watcher(begun=begun, ended=ended),
        )
    _answer(found, output, as_json=as_json)


def _answer(found: Comparison, output: Path, *, as_json: bool) -> None:
    if as_json:
        console.emit(found.to_dict())
        return
    from rich.markdown import Markdown

    out = console.screen()

    text = (output / "table.md").read_text(encoding="utf-8")
    out.print(Markdown(text) if out.is_terminal else text)
    missing = len(found.cells) - len(found.rows)
    if missing:
        out.print(f"not there yet: {console.count(missing, 'cell')}.")
    out.print(f"table: {output / 'table.md'}, picture: {output / 'picture.svg'}", style="dim")
