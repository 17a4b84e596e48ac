"""`loftq train --task`: what differs from a run on a user's own data."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from loftq.tasks.result import TaskResult


def task_types() -> dict[str, Any]:
    """Options of a run on a task, with their types."""
    from loftq.tasks.config import option_types

    return option_types()


def train_on_task(model: str, task: str, output: Path, **options: Any) -> TaskResult:
    """Run it; options that a task has no use for are refused by name."""
    from loftq.tasks import TaskError, find_task, train_task

    chosen = find_task(task)
    for name, remedy in (
        ("validation", "the task says what it validates on"),
        ("memory", "choose bits, batch_size and max_length yourself"),
    ):
        if options.get(name) is not None:
            raise TaskError(f"{name}: has no meaning with --task; {remedy}.")
        options.pop(name, None)
    return train_task(model, chosen, output, **options)


def add_end(lines: Any, output: Path, result: Any) -> None:
    """Scores, bytes, and what may come next, as lines at the end of a run."""
    from loftq.cli import console

    for split, scores in result.metrics.items():
        for metric, score in scores.items():
            span = (
                f"95 % interval {score['low']:.4f} to {score['high']:.4f}, {score['rows']:,} rows"
            )
            lines.add_row(split, f"{metric} {score['value']:.4f}", span)
    parts = ", ".join(
        f"{name} {console.size(size)}" for name, size in result.bytes.items() if name != "total"
    )
    lines.add_row("size", console.size(result.bytes["total"]), parts)
    what = "model" if (output / "model").is_dir() else "adapter"
    lines.add_row("wrote", str(output / what), "the best checkpoint by validation")
    lines.add_row("next", f"loftq eval {result.task} {output}")
