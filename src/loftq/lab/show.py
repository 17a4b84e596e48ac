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
    console.print()
    console.print(table(result))
    for line in (*sentences(result), "", *reading(result), "", *next_steps(result)):
        console.print(line, markup=False, highlight=False, soft_wrap=True)


def table(result: DemoResult) -> Table:
    """The rows, sizes in MB of 10^6 bytes."""
    from rich import box
    from rich.table import Table

    grid = Table(box=box.SIMPLE, title=title(result), title_justify="left", caption=caption(result),
                 caption_justify="left")  # fmt: skip
    grid.add_column("")
    for heading in ("total MB", "of it adapter", "bits a weight", "perplexity\nbefore tuning",
                    f"after {result.tuning['steps']} steps"):  # fmt: skip
        grid.add_column(heading, justify="right")
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


def title(result: DemoResult) -> str:
    """What was compared."""
    return f"{result.model} (weights {result.weights})"


def caption(result: DemoResult) -> str:
    """Everything that decides the numbers, and that they carry no claim."""
    text, tuning = result.text, result.tuning
    return (
        f"Text: {text['name']}.\n"
        f"Perplexity: {text['evaluation']}, "
        f"{text['windows']} windows of {text['context']} tokens.\n"
        f"Tuning: {tuning['steps']} steps of {tuning['tokens_per_step']} tokens, "
        f"{tuning['optimizer']}, rank {tuning['rank']}, same order and rate for every row.\n"
        f"{result.note}"
    )


def perplexity_text(value: float) -> str:
    """Three figures; powers of ten where a model has lost its way."""
    if math.isnan(value):
        return "diverged"
    return f"{value:.3g}" if value < 1e5 else f"{value:.0e}".replace("e+0", "e").replace("e+", "e")


def sentences(result: DemoResult) -> list[str]:
    """One greedy sentence a row."""
    width = max(len(row.label) for row in result.rows)
    lines = [f"  {row.label:<{width}}  {row.sentence}" for row in result.rows]
    return [f'After tuning, "{result.text["prompt"]}" is continued (greedy) as:', *lines]


def reading(result: DemoResult) -> list[str]:
    """What a reader may conclude, and what not."""
    lines = [
        "How to read it",
        "  Sizes are of everything stored: packed layers, what stays 16-bit, and the adapter "
        "(float32).",
        "  The 2-bit rows show that the start decides how far a few steps get. QLoRA has the same "
        "rounding as ours",
        "  and an adapter that starts at zero; LoftQ as published scales each block by its largest "
        "weight, stored as float32.",
        "  Not shown: how the rows compare after real training, on another text or on a larger "
        "model, which loses less.",
        "  A few steps do not make a 2-bit model usable.",
    ]
    if result.weights != "as given":
        lines.append(
            "  The reference itself was stored at 4 bits once, so it is no 16-bit baseline."
        )
    if result.device == "cpu":
        lines.append(
            "  On this CPU the packed weights were unpacked in memory after the first measurement, "
            "for speed alone."
        )
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
