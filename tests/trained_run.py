"""A RUN folder as `loftq train` leaves it, written by hand on an output of `quantize`."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path
from typing import Any

import yaml

STEPS = 20
SAMPLES = [
    {
        "prompt": "Say <b>one</b> & two",
        "reference": "one two",
        "before": "three <script>alert(1)</script>",
        "after": "one two\nthree",
    },
    {"prompt": "four", "reference": None, "before": "x" * 200, "after": "five"},
    {"prompt": "seven eight " * 30, "reference": "nine", "before": "", "after": "ten"},
]
MEMORY = {
    "predicted": {"backbone": 4_000_000, "head": 0, "optimizer": 2_000_000, "logits": 1_000_000},
    "measured_peak": 7_200_000,
}
DATA = {
    "format": "messages", "source": "chats.jsonl", "rows": 50, "trained_rows": 47,
    "held_out_rows": 3, "tokens": 18_345, "trained_tokens": 9_120, "truncated": 1, "dropped": 0,
    "max_length": 512,
}  # fmt: skip


def write_run(folder: Path, out: Path, *, model: str = "org/model") -> Path:
    """A finished run on the output `out`, its adapter the start adapter."""
    shutil.copytree(out / "init_adapter", folder / "adapter")
    backbone = json.loads((out / "loftq.json").read_text())["backbone"]
    base = {"path": str(out), "backbone": backbone, "model": model}
    for name, value in (("base", base), ("samples", SAMPLES), ("memory", MEMORY), ("data", DATA)):
        (folder / f"{name}.json").write_text(json.dumps(value))
    config = {"version": 1, "model": model, "learning_rate": 2e-4, "max_steps": STEPS}
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows()))
    (folder / "checkpoints").mkdir()
    return folder


def rows() -> list[dict[str, Any]]:
    """Training steps, a validation every fifth with the lowest loss at 15, and the summary."""
    found: list[dict[str, Any]] = [{"step": 0, "epoch": 0.0, "validation_loss": 4.0}]
    for step in range(1, STEPS + 1):
        found.append(
            {
                "step": step, "epoch": step / 10, "loss": 2 + 2 * math.exp(-step / 5),
                "learning_rate": 2e-4, "grad_norm": 1.0, "tokens_per_second": 400.0 + step,
                "seconds": 0.5 * step, "peak_gb": 0.0072,
            }
        )  # fmt: skip
        if step % 5 == 0:
            loss = 2.2 + abs(step - 15) / 10
            found.append({"step": step, "epoch": step / 10, "validation_loss": loss})
    return [*found, {"summary": {"steps": STEPS, "best_step": 15, "seconds": 10.2}}]
