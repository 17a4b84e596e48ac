"""Progress on stderr, where a person looks at it; nothing at all otherwise."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from loftq.cli.console import count, duration

if TYPE_CHECKING:
    from rich.console import Console
    from rich.progress import Progress

    from loftq.integrations.refine import Step
    from loftq.pipeline.plan import Batch, Plan
    from loftq.pipeline.progress import Tally


class Bar:
    """A bar with a line of text that says how things stand; shown only on a terminal.

    Args:
        console: of stderr.
        title: what is counted.
    """

    def __init__(self, console: Console, title: str) -> None:
        self._progress: Progress | None = None
        if console.is_terminal:
            self._progress = _bar(console)
            self._task = self._progress.add_task(title, total=None, status="")
            self._progress.start()

    def update(self, done: int, total: int, status: str = "") -> None:
        """Show that `done` of `total` are done."""
        if self._progress is not None:
            self._progress.update(self._task, completed=done, total=total, status=status)

    def close(self) -> None:
        """Take the bar away."""
        if self._progress is not None:
            self._progress.stop()

    def __enter__(self) -> Bar:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class QuantizeProgress:
    """Follows a quantization: layers, seconds left, mean errors so far, and what was resumed.

    Args:
        screen: for the one line about a resumed run.
        console: of stderr, for the bar.
    """

    def __init__(self, screen: Console, console: Console) -> None:
        self._screen, self._console = screen, console
        self._bar: Bar | None = None
        self._tally: Tally | None = None
        self._announced = False
        self.resumed = 0
        """Layers that an earlier run had finished."""

    def start(self, plan: Plan) -> None:
        """The plan is known and work begins."""
        from loftq.pipeline.progress import Tally

        self.close()
        self._tally = Tally(plan)
        self._bar = Bar(self._console, "layers")
        self._bar.update(0, len(plan.layers), f"{duration(self._tally.seconds_left)} left")

    def on_block(self, path: str, done: int, total: int) -> None:
        """The statistics of a block are taken (integrations.calibrate.OnBlock)."""
        if self._tally is None:  # for an allocation, before there is a plan
            self._costs().update(0, 0, f"calibrating, {done} of {total} blocks")
            return
        assert self._bar is not None
        layers = len(self._tally.plan.layers)
        self._bar.update(0, layers, f"calibrating, {done} of {total} blocks")

    def on_cost(self, layer: str, done: int, total: int) -> None:
        """The cost of a layer in a format is measured (pipeline.allocate.OnCost)."""
        self._costs().update(done, total, f"measuring, {layer}")

    def on_batch(self, batch: Batch, records: list[Mapping[str, Any]], resumed: bool) -> None:
        """A batch is done (pipeline.run.OnBatch)."""
        assert self._tally is not None
        assert self._bar is not None
        self._tally.add(batch, records, resumed)
        if resumed:
            self.resumed += len(records)
            return
        self.announce()
        before, after = self._tally.mean_errors
        left = duration(self._tally.seconds_left)
        status = f"{left} left, mean error {before:.4f} -> {after:.4f}"
        self._bar.update(self._tally.layers, len(self._tally.plan.layers), status)

    def on_refine(self, step: Step) -> None:
        """A step of a refinement is done (integrations.refine.Listener)."""
        assert self._bar is not None
        left = "" if step.seconds_left is None else f"{duration(step.seconds_left)} left, "
        loss = "" if step.loss is None else f"loss {step.loss:.4g}"
        where = f"refining {step.scope}, stage {step.stage} of {step.stages}: {left}{loss}"
        self._bar.update(round(1000 * (step.done + step.share)), 1000 * step.units, where)

    def announce(self) -> None:
        """Say once how much an earlier run had done, if anything."""
        if self.resumed and not self._announced:
            assert self._tally is not None
            total = len(self._tally.plan.layers)
            self._screen.print(
                f"resumed: {count(self.resumed, 'layer')} of {total} done by an earlier run"
            )
        self._announced = True

    def close(self) -> None:
        """Take the bar away."""
        if self._bar is not None:
            self._bar.close()

    def _costs(self) -> Bar:
        if self._bar is None:
            self._bar = Bar(self._console, "costs")
        return self._bar


def _bar(console: Console) -> Progress:
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[status]}"),
        console=console,
        transient=True,
    )
