"""Predicted against measured peak of training, and training under a cap, on one GPU.

    python benchmarks/train/memory_peak.py --output results.md

Shapes are real, weights random and packed; each cell runs optimizer steps with the loss of
`loftq train`. "measured" is torch.cuda.max_memory_allocated, without the CUDA context. A cap
is torch.cuda.set_per_process_memory_fraction: what exceeds it is out of memory, as on a small card.
One cell that fails does not stop the others. On a CPU (--device cpu --shapes tiny) the script only
shows that it runs.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
import traceback
from dataclasses import replace
from datetime import date
from pathlib import Path
from typing import Any

os.environ.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")

import torch

sys.path.insert(0, str(Path(__file__).parent))
from machine import machine, release
from shapes import random_model, subject, with_adapter
from step import train_steps

from loftq.train.memory.predict import TrainingSettings, predict
from loftq.train.prepare import add_fused_head

BITS, RANKS, LENGTHS = (4, 3, 2), (16, 64), (1024, 2048)
COMPARED = ("Llama-2-7B", "Qwen3-8B", "Qwen3-14B")
CAPPED = (("Qwen3-8B", 7.2), ("Qwen3-14B", 11.0), ("Qwen3-32B", 22.0))
TABLES = {"Llama-2-7B": {}, "tiny": {"embedding": 8, "head": 8}}
PACKED_TABLES = {"embedding": 8, "head": 8}
CAPPED_STEPS = 8
HEAD = ("| model | bits | rank | tokens | predicted GB | measured GB | ratio | peak at |",
        "| --- | --: | --: | --: | --: | --: | --: | --- |")  # fmt: skip
CAPPED_HEAD = ("| model | cap GB | predicted GB | measured GB | tokens/s | loss, first to last |",
               "| --- | --: | --: | --: | --: | --- |")  # fmt: skip


class Report:
    """Lines of a Markdown file that is complete at any moment."""

    def __init__(self, path: Path) -> None:
        self._path, self._lines = path, []  # type: ignore[var-annotated]

    def add(self, *lines: str) -> None:
        """Append, write, show."""
        self._lines += lines
        self._path.write_text("\n".join(self._lines) + "\n", encoding="utf-8")
        print("\n".join(lines), flush=True)

    def show(self) -> None:
        """Everything once more."""
        print("\n" + "\n".join(self._lines), flush=True)


def main() -> None:
    """Both tables."""
    options = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    options.add_argument("--output", type=Path, required=True)
    options.add_argument("--device", default="cuda")
    options.add_argument("--shapes", nargs="*", default=list(COMPARED))
    options.add_argument("--seconds", type=float, default=330, help="start no cell after this")
    given = options.parse_args()
    report, start = Report(given.output), time.perf_counter()
    report.add(f"# Training memory, {machine(given.device)}, {date.today()}", "")
    report.add(*CAPPED_HEAD)
    for shape, gigabytes in CAPPED if given.device == "cuda" else ():
        report.add(
            _guarded(lambda s=shape, g=gigabytes: _capped(s, g), f"| {shape} | {gigabytes} |")
        )
    report.add("", *HEAD)
    for shape in given.shapes:
        for bits in BITS:
            if time.perf_counter() - start < given.seconds:
                _compare(report, shape, bits, given.device, start + given.seconds)
    report.show()


def _compare(report: Report, shape: str, bits: int, device: str, deadline: float) -> None:
    """The rows of one model in one width: two ranks, two lengths."""
    try:
        described = _subject(shape, bits=bits)
        model = random_model(shape, described, device=device, dtype=torch.bfloat16)
    except Exception:
        traceback.print_exc()
        report.add(f"| {shape} | {bits} | could not be built |")
        return
    for rank in RANKS:
        adapted = with_adapter(model, described, rank)
        for length in LENGTHS:
            if time.perf_counter() < deadline:
                row = f"| {shape} | {bits} | {rank} | {length} |"
                report.add(
                    _guarded(lambda r=rank, n=length, a=adapted, w=row: _cell(
                        a, described.with_rank(r), n, w, device), row)
                )  # fmt: skip
        model = adapted.unload()  # the base again, without adapters
        release()


def _cell(adapted: Any, described: Any, length: int, row: str, device: str) -> str:
    settings = _settings(adapted, length, device)
    predicted = predict(described, settings)
    release()
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    train_steps(adapted, settings, 3, device=device)
    measured = torch.cuda.max_memory_allocated() if device == "cuda" else 0
    ratio = f"{predicted.total / measured:.3f}" if measured else "-"
    return (
        f"{row} {predicted.total / 1e9:.3f} | {measured / 1e9:.3f} | {ratio} | {predicted.moment} |"
    )


def _capped(shape: str, gigabytes: float) -> str:
    """Train one row of 1024 tokens with the allocator capped."""
    total = torch.cuda.get_device_properties(0).total_memory
    torch.cuda.set_per_process_memory_fraction(gigabytes * 1e9 / total)
    try:
        described = _subject(shape, bits=4)
        model = random_model(shape, described, device="cuda", dtype=torch.bfloat16)
        adapted = with_adapter(model, described, 16)
        settings = _settings(adapted, 1024, "cuda")
        predicted = predict(described, settings).total
        torch.cuda.reset_peak_memory_stats()
        trained = train_steps(adapted, settings, CAPPED_STEPS, device="cuda")
        measured = torch.cuda.max_memory_allocated()
        rate = settings.tokens / sorted(trained.seconds[2:])[len(trained.seconds[2:]) // 2]
        falling = trained.losses[-1] < trained.losses[0]
        finite = all(loss == loss and abs(loss) < 1e9 for loss in trained.losses)
        note = "" if falling and finite else " NOT FALLING"
        return (
            f"| {shape} | {gigabytes} | {predicted / 1e9:.3f} | {measured / 1e9:.3f} | {rate:,.0f} "
            f"| {trained.losses[0]:.3f} to {trained.losses[-1]:.3f}{note} |"
        )
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
        release()


def _subject(shape: str, **options: Any) -> Any:
    return subject(shape, rank=16, **TABLES.get(shape, PACKED_TABLES), **options)


def _settings(adapted: Any, length: int, device: str) -> TrainingSettings:
    settings = TrainingSettings(length=length, device=device)
    fused = add_fused_head(adapted.get_base_model())
    return settings if fused else replace(settings, loss="full")


def _guarded(cell: Any, row: str) -> str:
    try:
        return cell()
    except Exception as error:
        traceback.print_exc()
        return f"{row} {type(error).__name__}: {str(error).splitlines()[0][:80]} |"
    finally:
        release()


if __name__ == "__main__":
    main()
