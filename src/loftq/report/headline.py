"""What a reader of a page looks for first, and what to do next."""

from __future__ import annotations

import math
import shlex
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, TypeGuard

from loftq.report.collect import Facts, Training
from loftq.units import size


@dataclass(frozen=True)
class Tile:
    """One number that a reader looks for first."""

    label: str
    value: str
    note: str


def tiles(facts: Facts) -> list[Tile]:
    """The numbers at the head of a page."""
    found = [] if facts.training is None else list(_training_tiles(facts.training))
    if facts.backbone is None:
        return found
    report = facts.backbone.report
    sizes, about = report.bytes, report.model
    share = sizes["model"] / max(1, sizes["source_at_16_bits"])
    return [
        *found,
        Tile(
            "Model",
            size(sizes["model"]),
            f"{share:.0%} of {size(sizes['source_at_16_bits'])} at 16 bits",
        ),
        Tile("Bits a weight", f"{report.bits_per_weight:.3f}", "packed layers, scales included"),
        Tile(
            "Relative error at the start",
            f"{report.mean_error:.4f}",
            f"{report.mean_plain_error:.4f} by rounding alone; mean of {len(report.layers)} layers",
        ),
        Tile(
            "Adapter",
            f"rank {about['rank']}",
            f"alpha {about['alpha']:g}, {size(sizes['adapter'])}",
        ),
    ]


def _task_tiles(task: Mapping[str, Any]) -> Iterator[Tile]:
    """The headline metric of a published task on each reported split."""
    for split, scores in (task.get("metrics") or {}).items():
        score = scores.get(task.get("primary"))
        if score is not None:
            span = (
                f"95 % interval {score['low']:.4f} to {score['high']:.4f}, {score['rows']:,} rows"
            )
            label = f"{task['task']} {split}: {task['primary']}"
            yield Tile(label, f"{score['value']:.4f}", span)


def _training_tiles(training: Training) -> list[Tile]:
    metrics, found = training.metrics, list(_task_tiles(training.task))
    best = metrics.best
    if best is not None:
        first = metrics.validation[0]
        was = "" if first is best else f"{first['validation_loss']:.4f} at step {first['step']:g}; "
        note = f"{was}best at step {best['step']:g}, {training.loss_unit}"
        found.append(Tile("Validation loss", f"{best['validation_loss']:.4f}", note))
    rows = metrics.train
    if rows:
        last = rows[-1]
        epochs = f", {last['epoch']:.2g} epochs" if _finite(last.get("epoch")) else ""
        found.append(
            Tile("Training loss", f"{last['loss']:.4f}", f"at step {last['step']:g}{epochs}")
        )
        speeds = sorted(float(x) for row in rows if _finite(x := row.get("tokens_per_second")))
        if speeds:
            middle = speeds[len(speeds) // 2]
            found.append(Tile("Speed", f"{middle:,.0f}", "tokens per second, median of the steps"))
    if training.measured_peak is not None:
        planned = sum(training.memory.values())
        note = f"{size(planned)} predicted" if planned else "measured"
        found.append(Tile("Peak memory", size(training.measured_peak), note))
    return found


def next_commands(facts: Facts) -> list[tuple[str, str]]:
    """(command, what it does) to go on with."""
    folder, out = shlex.quote(str(facts.folder)), shlex.quote(str(facts.backbone_folder))
    if facts.training is None:
        return [
            (f"loftq train {out} --data FILE -o RUN", "fine-tune it on your data"),
            (f"loftq chat {out}", "talk to it as it starts"),
            (f"loftq export {out} --for vllm", "for an engine: transformers, vllm or llama.cpp"),
            (f"loftq inspect {out} --check", "every byte against its record"),
        ]
    if facts.training.task:
        name = facts.training.task["task"]
        return [(f"loftq eval {name} {folder}", "score it again, or on another split")]
    return [
        (f"loftq chat {folder}", "talk to it"),
        (f"loftq export {folder} --for vllm", "for an engine: transformers, vllm or llama.cpp"),
        (f"loftq export {folder} --to lora -o LORA", "an adapter for the original model"),
        (f"loftq inspect {out} --check", "every byte of its backbone against its record"),
    ]


def _finite(value: object) -> TypeGuard[float]:
    return isinstance(value, int | float) and math.isfinite(value)
