"""`loftq eval harness`: our loaded model handed to lm-evaluation-harness."""

from __future__ import annotations

from typing import Annotated

import typer

from loftq.cli import console, options


def harness(
    path: options.Scored,
    tasks: Annotated[str, typer.Option(help="Its tasks or groups, separated by commas.")],
    settings: Annotated[
        list[str] | None,
        typer.Argument(metavar="KEY=VALUE", help="batch_size=8 num_fewshot= dtype=auto"),
    ] = None,
    limit: Annotated[
        int | None, typer.Option(help="Score the first so many documents of each. Default: all.")
    ] = None,
    include: Annotated[
        str | None, typer.Option(help="Folder with tasks of your own (its YAML files).")
    ] = None,
    adapter: options.AdapterOf = None,
    device: options.Device = None,
    as_json: options.AsJson = False,
) -> None:
    """Score a causal language model on tasks of lm-evaluation-harness."""
    chosen = options.parse_pairs(settings or (), KEYS)
    with console.answering(as_json=as_json):
        from loftq.tasks.harness import run_harness

        found = run_harness(
            path,
            options.split_names([tasks]),
            limit=limit,
            include=include,
            adapter=adapter,
            device=device,
            **chosen,
        )
    if as_json:
        console.emit(found.to_dict())
        return
    shown = console.table("task", "metric", "value", "standard error", right=("value",))
    for task, scores in found.metrics.items():
        for metric, (value, error) in scores.items():
            shown.add_row(task, metric, f"{value:.4f}", "" if error is None else f"{error:.4f}")
    out = console.screen()
    out.print(shown)
    out.print(f"{path}, adapter {found.adapter}, lm-eval {found.version}, few-shot examples: "
              f"{found.shots}")  # fmt: skip


def _whole(value: str) -> int:
    if not value.isdigit():
        raise ValueError("expected a whole number")
    return int(value)


KEYS = {"batch_size": _whole, "num_fewshot": _whole, "dtype": options.dtype_name}
