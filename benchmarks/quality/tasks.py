"""Tasks trained and scored through `train_task`, cell by cell: does each kind work, and how fast.

    python benchmarks/quality/tasks.py MODEL --data LOFTQ_DATA --out rows.jsonl \
        --cells gsm8k-loss:loftq:2 gsm8k-loss:lora16:16 wikitext2-small:loftq:2

A cell is TASK:METHOD:BITS. A row holds the scores before any step (of the start) and after, steps,
seconds, peak memory, bytes. A cell that fails is a row, too. No new cell begins after --seconds.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
import traceback
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from loftq.tasks import find_task, train_task
from loftq.tasks.config import BASELINES


def main() -> None:
    """Run the cells, write a row for each, print a table last."""
    options = _options()
    began, rows = time.perf_counter(), []
    with tempfile.TemporaryDirectory() as scratch:
        for i, cell in enumerate(options.cells):
            if time.perf_counter() - began > options.seconds:
                rows.append({"cell": cell, "error": "no time left"})
                continue
            rows.append(_row(cell, Path(scratch), i, options))
            with options.out.open("a", encoding="utf-8") as file:
                file.write(json.dumps(rows[-1]) + "\n")
    print(table(rows))


def _options() -> argparse.Namespace:
    options = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    options.add_argument("model")
    options.add_argument("--data", type=Path, required=True)
    options.add_argument("--out", type=Path, required=True)
    options.add_argument("--cells", nargs="+", required=True, metavar="TASK:METHOD:BITS")
    options.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    options.add_argument("--seconds", type=float, default=200.0)
    options.add_argument("--steps", type=int, default=100)
    options.add_argument("--rank", type=int, default=16)
    options.add_argument("--seed", type=int, default=0)
    options.add_argument("--keys", nargs="*", default=(), metavar="KEY=VALUE",
                         help="further options, JSON values")  # fmt: skip
    return options.parse_args()


def _row(cell: str, scratch: Path, number: int, options: argparse.Namespace) -> dict[str, Any]:
    task, method, bits = cell.split(":")
    chosen: dict[str, Any] = {"method": method, "max_steps": options.steps, "seed": options.seed}
    chosen |= {key: json.loads(value) for key, _, value in (k.partition("=") for k in options.keys)}
    if method not in BASELINES:
        chosen |= {"bits": float(bits), "rank": options.rank}
    elif method == "lora16":
        chosen["rank"] = options.rank
    began = time.perf_counter()
    try:
        found = train_task(
            options.model, task, scratch / str(number), data=options.data, device=options.device,
            cache=scratch / "packed", **chosen,
        )  # fmt: skip
    except Exception as error:  # one cell must not stop the others
        traceback.print_exc()
        return {"cell": cell, "error": f"{type(error).__name__}: {error}"}
    return {
        "cell": cell,
        "options": chosen,
        "metrics": found.metrics,
        "primary": find_task(task).primary,
        "summary": {k: v for k, v in found.summary.items() if k != "metrics"},
        "bytes": found.bytes,
        "memory": found.memory.get("measured_peak"),
        "wall_seconds": round(time.perf_counter() - began, 1),
        "torch": torch.__version__,
        "device": torch.cuda.get_device_name() if options.device == "cuda" else "cpu",
    }


def table(rows: list[Mapping[str, Any]]) -> str:
    """A Markdown table of the rows."""
    lines = [
        "| cell | headline | 95 % | validation loss | steps | s train | s all | peak GB | MB |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        if "error" in row:
            lines.append(f"| {row['cell']} | {row['error'][:120]} | | | | | | | |")
            continue
        score, summary = next(iter(row["metrics"].values()))[row["primary"]], row["summary"]
        losses = f"{summary['first_validation_loss']:.4f} -> {summary['best_validation_loss']:.4f}"
        peak = "" if row["memory"] is None else f"{row['memory'] / 1e9:.2f}"
        lines.append(
            f"| {row['cell']} | {row['primary']} {score['value']:.4f} | {score['low']:.4f} to "
            f"{score['high']:.4f} | {losses} | {summary['steps']} | {summary['seconds']:.0f} | "
            f"{row['wall_seconds']:.0f} | {peak} | {row['bytes']['total'] / 1e6:.1f} |"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    main()
