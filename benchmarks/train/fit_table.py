"""The table of docs/memory.md: what `loftq plan --memory` chooses per model, card and context.

    python benchmarks/train/fit_table.py --write docs/memory.md

Predictions all of them; benchmarks/train/memory_peak.py holds them against a GPU.
"""

from __future__ import annotations

import argparse
import sys
from functools import cache
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))
from shapes import SHAPES

from loftq.train.memory import Fit, NothingFits, fit, subject_of_config

CARDS = (8, 12, 16, 24, 48)
CONTEXTS = (1024, 2048, 4096)
MODELS = ("Llama-2-7B", "Qwen3-8B", "Qwen3-14B", "Qwen3-32B")
BEGIN, END = "<!-- fit table -->", "<!-- end of fit table -->"


def main() -> None:
    """Print the table, or put it into a page."""
    options = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    options.add_argument("--write", type=Path, help="page with the two markers")
    page = options.parse_args().write
    table = "\n".join(rows())
    print(table)
    if page is not None:
        text = page.read_text(encoding="utf-8")
        before, _, rest = text.partition(BEGIN)
        after = rest.partition(END)[2]
        page.write_text(f"{before}{BEGIN}\n\n{table}\n\n{END}{after}", encoding="utf-8")


def rows() -> list[str]:
    """A row per model and context, a column per card."""
    lines = [
        "| model | context | " + " | ".join(f"{card} GB" for card in CARDS) + " |",
        "| --- | --: |" + " --- |" * len(CARDS),
    ]
    for model in MODELS:
        configure = _configure(model)
        for context in CONTEXTS:
            cells = [_cell(configure, card, context) for card in CARDS]
            lines.append(f"| {model} | {context} | " + " | ".join(cells) + " |")
    return lines


def _configure(model: str) -> Any:
    return cache(lambda **choices: subject_of_config(SHAPES[model](), name=model, **choices))


def _cell(configure: Any, card: int, context: int) -> str:
    try:
        return _words(fit(configure, card * 10**9, fixed={"length": context}))
    except NothingFits:
        return "-"


def _words(found: Fit) -> str:
    options, step = found.options, found.settings
    tables = "8-bit tables" if options["embedding"] == 8 else "16-bit tables"
    host = ", embedding on the host" if step.embedding_on_host else ""
    kept = "" if step.checkpointing else ", no checkpointing"
    rank = "" if options["rank"] == 16 else f", rank {options['rank']}"
    return (
        f"{options['bits']} bits{rank}, {tables}{host}, batch {step.batch_size}{kept}: "
        f"{found.peak.total / 1e9:.1f}"
    )


if __name__ == "__main__":
    main()
