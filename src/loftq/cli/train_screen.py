"""What `loftq train` shows: the choices and an example first, then progress, then answers."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from loftq.cli import console
from loftq.cli.progress import Bar, QuantizeProgress
from loftq.train.listener import Briefing, Listener, Pace

if TYPE_CHECKING:
    from rich.console import Console

    from loftq.integrations.refine import Step
    from loftq.pipeline.plan import Batch, Plan
    from loftq.train.data import Prepared
    from loftq.train.memory.fit import Fit

EXAMPLE = 1200  # characters of the example that are shown
ANSWER = 300  # of a prompt or an answer
OF_A_VALIDATION = ("step", "epoch", "validation_loss")
"""Keys of every validation; any others are the metrics of a task."""
LINES = 10  # progress lines of a run away from a terminal
PATIENCE = 60  # seconds without a line there until a scoring says how far it is


class TrainScreen(Listener):
    """Prints a run: a bar on a terminal, a few lines otherwise.

    Args:
        screen: of stdout.
        side: of stderr, for bars.
    """

    def __init__(self, screen: Console, side: Console) -> None:
        self._screen, self._side = screen, side
        self._quantize: QuantizeProgress | None = None
        self._bar: Bar | None = None
        self._timed = False
        self._place, self._told, self._spoken = (0, 0), "", 0.0

    def quantizing(self, plan: Plan, folder: Path) -> None:
        """Say what comes first, and follow it."""
        self._screen.print(
            f"MODEL is full precision: quantizing it to {plan.bits_per_weight:.2f} bits a weight "
            f"first, kept in {folder} for later runs"
        )
        self._quantize = QuantizeProgress(self._screen, self._side)
        self._quantize.start(plan)

    def calibrated(self, path: str, done: int, total: int) -> None:
        """Move the bar of the calibration."""
        assert self._quantize is not None
        self._quantize.on_block(path, done, total)

    def quantized(self, batch: Batch, records: list[Mapping[str, Any]], resumed: bool) -> None:
        """Move the bar of the quantization."""
        assert self._quantize is not None
        self._quantize.on_batch(batch, records, resumed)

    def refined(self, step: Step) -> None:
        """Move the bar of the refinement."""
        assert self._quantize is not None
        self._quantize.on_refine(step)

    def quantizing_done(self) -> None:
        """Take it away."""
        assert self._quantize is not None
        self._quantize.close()

    def fitted(self, fit: Fit) -> None:
        """What was chosen for the memory that was given."""
        lines = console.facts()
        for choice in fit.choices:
            lines.add_row(choice.name, choice.value, choice.reason)
        peak, room = console.size(fit.peak.total), console.size(fit.usable)
        lines.add_row("fits", f"{peak} at the peak, predicted", f"of {room} that tensors may take")
        self._screen.print(lines)

    def ready(self, briefing: Briefing) -> None:
        """Everything that is known before step 1."""
        lines = console.facts()
        _add_data(lines, briefing.prepared)
        _add_training(lines, briefing)
        for note in briefing.notes:
            lines.add_row("note", note)
        self._screen.print(lines)
        _print_example(self._screen, briefing.prepared)
        if briefing.resumed:
            self._screen.print(f"resumed: going on after step {briefing.resumed}")
        self._bar = Bar(self._side, "steps")
        self._place, self._spoken = (briefing.resumed, briefing.steps.total), time.monotonic()
        self._bar.update(*self._place)

    def step(self, row: Mapping[str, Any], pace: Pace) -> None:
        """A step is done."""
        assert self._bar is not None
        if pace.epoch_seconds is not None and not self._timed:
            self._timed = True
            self._screen.print(f"an epoch takes {console.duration(pace.epoch_seconds)}, measured")
        self._place, self._spoken = (pace.step, pace.total), time.monotonic()
        self._told = _status(row, pace)
        self._bar.update(*self._place, self._told)
        every = max(1, pace.total // LINES)
        if not self._side.is_terminal and (pace.step % every == 0 or pace.step == 1):
            self._screen.print(f"step {pace.step}/{pace.total}: {self._told}")

    def reading(self, what: str, done: int, total: int) -> None:
        """Part of a scoring is done: in the bar, and away from a terminal once a minute."""
        how_far = f"scoring, {done:,} of {total:,} {what}"
        if self._bar is not None:
            self._bar.update(*self._place, ", ".join(filter(None, (self._told, how_far))))
        if not self._side.is_terminal and time.monotonic() - self._spoken > PATIENCE:
            self._spoken = time.monotonic()
            self._screen.print(f"step {self._place[0]}: {how_far}")

    def validation(self, row: Mapping[str, Any], pace: Pace) -> None:
        """A validation is done."""
        self._spoken = time.monotonic()
        scores = [f"{key} {value:.4f}" for key, value in row.items() if key not in OF_A_VALIDATION]
        loss = f"validation loss {row['validation_loss']:.4f}"
        self._screen.print(f"step {pace.step}: {', '.join([loss, *scores])}")

    def finished(self, samples: Sequence[Mapping[str, Any]]) -> None:
        """The answers before and after."""
        self.close()
        for sample in samples:
            lines = console.facts()
            for name in ("prompt", "reference", "before", "after"):
                if sample[name] is not None:
                    lines.add_row(name, _short(str(sample[name]), ANSWER))
            self._screen.print()
            self._screen.print(lines)
        self._screen.print()

    def close(self) -> None:
        """Take the bars away."""
        for shown in (self._bar, self._quantize):
            if shown is not None:
                shown.close()


def _add_data(lines: Any, prepared: Prepared) -> None:
    counts = prepared.counts.to_dict()
    lines.add_row("data", f"format {counts['format']}, {console.count(counts['rows'], 'row')}")
    held = console.count(counts["held_out_rows"], "row")
    lines.add_row("rows", f"{counts['trained_rows']:,} to train, {held} held out")
    lines.add_row(
        "tokens",
        f"{counts['tokens']:,}, of which {counts['trained_tokens']:,} are learnt",
        f"rows of at most {counts['max_length']:,} tokens: {counts['truncated']} cut, "
        f"{counts['dropped']} left out",
    )
    for note in prepared.notes:
        lines.add_row("", note)


def _add_training(lines: Any, briefing: Briefing) -> None:
    config, steps = briefing.config, briefing.steps
    lines.add_row("base", briefing.base.how)
    lines.add_row(
        "adapter",
        f"{briefing.trainable:,} weights in float32, learning rate {config.learning_rate:g}",
        f"{config.optimizer}, {config.scheduler}",
    )
    lines.add_row(
        "steps",
        f"{steps.total:,} of {config.batch_size} x {config.gradient_accumulation} rows",
        f"an epoch has {steps.in_epoch:,}; validation every {steps.evaluate}",
    )
    lines.add_row("compute", f"{briefing.dtype} on {briefing.device}")
    for part, size in briefing.memory.items():
        lines.add_row("memory", f"{part} {console.size(size)}")
    if briefing.memory:
        total = console.size(sum(briefing.memory.values()))
        lines.add_row("", f"{total} in all", _of(briefing.capacity))
    if briefing.epoch_seconds is not None:
        guess = f"about {console.duration(briefing.epoch_seconds)} an epoch"
        lines.add_row("time", guess, "a guess from one forward pass; measured from step 2 on")


def _print_example(screen: Console, prepared: Prepared) -> None:
    from rich.text import Text

    coloured = screen.is_terminal
    text, left = Text(), EXAMPLE
    for part, learnt in prepared.example.segments:
        shown, left = _short(part, left, flat=False), max(0, left - len(part))
        marked = f"[{shown}]" if learnt and not coloured else shown
        text.append(marked, style=("green" if learnt else "dim") if coloured else "")
        if left == 0:
            break
    how = "green is learnt" if coloured else "[in brackets] is learnt"
    screen.print(f"example ({how}, the rest is only read):")
    screen.print(text)
    screen.print()


def _status(row: Mapping[str, Any], pace: Pace) -> str:
    words = [f"loss {row['loss']:.4f}"]
    if row.get("tokens_per_second") is not None:
        words.append(f"{row['tokens_per_second']:.0f} tokens/s")
    if pace.seconds_left is not None:
        words.append(f"{console.duration(pace.seconds_left)} left")
    if row.get("peak_gb") is not None:
        words.append(f"peak {console.size(row['peak_gb'] * 1e9)}{_of(pace.capacity, ' ')}")
    return ", ".join(words)


def _of(capacity: int | None, before: str = "") -> str:
    return "" if capacity is None else f"{before}of {console.size(capacity)}"


def _short(text: str, length: int, *, flat: bool = True) -> str:
    text = " ".join(text.split()) if flat else text
    return text if len(text) <= length else text[: max(0, length)] + " ..."
