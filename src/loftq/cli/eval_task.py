"""`loftq eval TASK`: scores of a run or a model on a published task."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from loftq.cli import console, options

if TYPE_CHECKING:
    from loftq.tasks.scoring import Evaluation

RUN_OR_MODEL = Annotated[
    str,
    typer.Argument(
        metavar="PATH", help="RUN of `train --task`, or a model that needs no new head."
    ),
]


def command(name: str) -> Callable[..., None]:
    """The verb that scores the task `name`."""

    def score(
        path: RUN_OR_MODEL,
        settings: Annotated[
            list[str] | None,
            typer.Argument(
                metavar="KEY=VALUE",
                help="batch_size=32 max_length= answer_tokens= beams=1 dtype=auto",
            ),
        ] = None,
        split: Annotated[
            str | None, typer.Option(help="Published split. Default: those that papers report.")
        ] = None,
        data: Annotated[
            str | None,
            typer.Option(help="Folder with the tasks' files. Default: LOFTQ_DATA, else the hub."),
        ] = None,
        limit: Annotated[
            int | None, typer.Option(help="Score so many rows of a fixed shuffle. Default: all.")
        ] = None,
        output: Annotated[
            Path | None, typer.Option("-o", "--output", help="Folder for the predictions.")
        ] = None,
        device: options.Device = None,
        as_json: options.AsJson = False,
    ) -> None:
        chosen = options.parse_pairs(settings or (), KEYS)
        with console.answering(as_json=as_json):
            from loftq.cli.progress import Bar
            from loftq.tasks.scoring import evaluate, write_predictions

            with Bar(console.side_screen(), "rows") as bar:
                found = evaluate(
                    path, name, split=split, data=data, limit=limit, device=device,
                    on_batch=lambda done, total: bar.update(done, total), **chosen,
                )  # fmt: skip
            written = [] if output is None else write_predictions(found.predictions, output)
        if as_json:
            console.emit({**found.to_dict(), "predictions": [str(p) for p in written]})
            return
        print_scores(found, written)

    return score


def print_scores(found: Evaluation, written: list[Path]) -> None:
    """The scores of an evaluation, and where its predictions are."""
    out = console.screen()
    out.print(scores_table(found.metrics))
    out.print(f"{found.model}, adapter {found.adapter}, {found.dtype} on {found.device}")
    for path in written:
        out.print(f"wrote {path}")


def scores_table(metrics: Any) -> Any:
    """Split, metric, value and 95 % interval of each score."""
    shown = console.table(
        "split", "metric", "value", "95 % interval", "rows", right=("value", "rows")
    )
    for split, scores in metrics.items():
        for metric, score in scores.items():
            span = f"{score['low']:.4f} to {score['high']:.4f} ({score['interval']})"
            shown.add_row(split, metric, f"{score['value']:.4f}", span, f"{score['rows']:,}")
    return shown


KEYS = {
    "batch_size": options.positive,
    "max_length": options.positive,
    "answer_tokens": options.positive,
    "beams": options.positive,
    "dtype": options.dtype_name,
}


def add_tasks(app: typer.Typer) -> None:
    """A verb for every task; help lists them on one line, not in twenty."""
    from loftq.tasks.table import TASKS

    for name, task in TASKS.items():
        app.command(name, hidden=True, help=f"{task.title}: {task.primary} and more.")(
            command(name)
        )
