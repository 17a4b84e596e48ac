"""The demo's result as a reader sees it: the table, what it means, what to do next."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

    from loftq.lab.demo import DemoResult


def print_result(result: DemoResult, console: Console) -> None:
    """Table, sentences, how to read it, next steps."""

    def say(lines: list[str]) -> None:
        for line in lines:
            console.print(line, markup=False, highlight=False, soft_wrap=True)

    say(["", f"{result.model}: weights {result.weights}"])
    console.print(table(result))
    for part in (conditions(result), sentences(result), reading(result), next_steps(result)):
        say([*part, ""])


def table(result: DemoResult) -> Table:
    """The rows; MB are 10^6 bytes."""
    from rich import box
    from rich.table import Table

    grid = Table(box=box.SIMPLE)
    grid.add_column("")
    for heading in (
        "total\nMB",
        "adapter\nMB",
        "bits per\nweight",
        "perplexity\nbefore",
        f"after {result.tuning['steps']}\nsteps",
    ):
        grid.add_column(heading, justify="right", no_wrap=True)
    for row in result.rows:
        grid.add_row(
            row.label,
            f"{row.total_bytes / 1e6:.1f}",
            f"{row.adapter_bytes / 1e6:.1f}",
            f"{row.bits_per_weight:.2f}",
            perplexity_text(row.perplexity_before),
            perplexity_text(row.perplexity_after),
        )
    return grid


def conditions(result: DemoResult) -> list[str]:
    """Everything that decides the numbers, and that they carry no claim."""
    text, tuning = result.text, result.tuning
    return [
        result.note,
        f"Text: {text['name']}.",
        f"Perplexity: {text['evaluation']}, {text['windows']} windows of {text['context']} tokens.",
        f"Tuning: {tuning['steps']} steps of {tuning['tokens_per_step']} tokens, "
        f"{tuning['optimizer']}, rank {tuning['rank']};",
        "the same tokens in the same order, and the same learning rate, for every row.",
    ]


def perplexity_text(value: float) -> str:
    """26.4, 1,987, 2e9: a power of ten where a model has lost its way."""
    if math.isnan(value):
        return "diverged"
    if value < 1e5:
        return f"{value:.1f}" if value < 1000 else f"{value:,.0f}"
    return "inf" if math.isinf(value) else f"{value:.0e}".replace("e+", "e").replace("e0", "e")


def sentences(result: DemoResult) -> list[str]:
    """One greedy sentence a row."""
    width = max(len(row.label) for row in result.rows)
    lines = [f"  {row.label:<{width}}  {row.sentence}" for row in result.rows]
    return [f'After tuning, "{result.text["prompt"]}" is continued (greedy) as:', *lines]


READING = """\
How to read it
  Total is all that is stored: the quantized layers (bits per weight counts their scales), what
  is not quantized (embedding, norms), and the adapter in float32.
  The 2-bit rows have adapters of one size; they differ in backbone and start. QLoRA rounds as
  ours does and starts its adapter at zero. LoftQ as published scales each block by its largest
  weight and stores the scales in float32.
  To be seen: what 4 bits cost here, and that at 2 bits the start decides where a few steps end.
  Not to be seen: how the rows compare after real training, on other text, or on a larger model,
  which loses less. A few steps do not make a 2-bit model usable.
"""
DEQUANTIZED = "  The reference was stored at 4 bits once: it is no 16-bit baseline."
UNPACKED = """\
  On this CPU the packed weights were unpacked in memory after the first measurement, for speed
  alone: the values are the same."""


def reading(result: DemoResult) -> list[str]:
    """What a reader may conclude, and what not."""
    lines = READING.splitlines()
    if result.weights != "as given":
        lines.append(DEQUANTIZED)
    if result.device == "cpu":
        lines += UNPACKED.splitlines()
    return lines


def next_steps(result: DemoResult) -> list[str]:
    """Exact commands."""
    work = result.work
    steps = [
        (f"loftq inspect {work}/4bit-loftq --check", "every byte against its record"),
        ("loftq plan MODEL --bits 2", "your model: bytes, memory, time; reads headers only"),
        ("loftq quantize MODEL -o OUT", "4 bits; --bits 2 --rank 64 for the smallest"),
        ("loftq eval ppl OUT --data FILE --context 2048", "what it cost, on your text"),
        (f'loftq.load("{work}/4bit-loftq", trainable=True)', "in Python: a PEFT model to train"),
    ]
    width = max(len(command) for command, _ in steps)
    minutes, seconds = divmod(round(result.seconds), 60)
    return [
        f"Done in {minutes} min {seconds} s on {result.device} ({result.threads} threads). Models "
        f"and tuned adapters are in {work}. Next:",
        *(f"  {command:<{width}}  # {what}" for command, what in steps),
    ]
