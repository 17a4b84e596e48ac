"""What a plan knows of its calibration: tokens, the place of statistics, what they cost."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Protocol

import torch
from torch import Tensor

from loftq.calibration import InputStatistics
from loftq.methods import METHODS, ProblemStatistics
from loftq.pipeline.layout import LayerInfo
from loftq.refine import Refinement

FLOPS = {"cpu": 5e10, "cuda": 2e13}
"""Rough float32 arithmetic a second of two cores and of a large GPU; plans only."""


@dataclass(frozen=True, kw_only=True)
class Calibration:
    """Tokens and statistics of a planned quantization."""

    kind: str
    """Statistics that the method needs: diagonal, gram or fisher."""
    source: str
    """Name of the text file."""
    windows: int
    context: int
    """Tokens of a window, padding included."""
    tokens: int
    """Tokens that count."""
    folder: str
    """Where statistics are kept (calibration/store.py)."""
    fingerprint: str
    """Of the statistics: weights, tokens and kind of device."""

    def to_dict(self) -> dict[str, object]:
        """JSON-ready."""
        return asdict(self)


@dataclass(frozen=True, kw_only=True)
class CalibrationCost:
    """What taking the statistics takes, estimated; nothing of it where they are there already."""

    seconds: float
    device_bytes: int
    """One block, its statistics and the hidden states of all tokens; for Fisher means all blocks,
    to which activations of one window come."""
    disk_bytes: int
    """Statistics of all layers."""

    def to_dict(self) -> dict[str, object]:
        """JSON-ready."""
        return asdict(self)


class Statistics(Protocol):
    """Where statistics are read from: a `StatisticsStore`, or a `SequentialStatistics`.

    Batches come one after the other: `meet` a batch, `read` its layers, solve, `settle` each.
    """

    def meet(self, layers: Sequence[str]) -> None:
        """The layers of a batch are to be solved next."""

    def settle(self, layer: str, weight: Callable[[], Tensor]) -> None:
        """A layer is solved: what it computes with, in its module's orientation."""

    def close(self) -> None:
        """No more batches will come."""

    def read(self, layer: str, kind: str, device: torch.device | str = "cpu") -> InputStatistics:
        """Of the inputs of one layer, on a device."""


def calibration_cost(
    calibration: Calibration, layers: Sequence[LayerInfo], device: str
) -> CalibrationCost:
    """Estimate from shapes alone.

    Which layers share their input is known only when the model runs. Of n layers of one block with
    inputs of one width, half (rounded up) are taken to read an input of their own: q, k, v, o, gate
    and up read three, down its own.
    """
    widths = Counter((layer.depth, layer.shape[1]) for layer in layers)
    inputs = {key: -(-count // 2) for key, count in widths.items()}
    squares = calibration.kind == "gram"
    held = {key: n * (4 * key[1] ** 2 if squares else 8 * key[1]) for key, n in inputs.items()}
    blocks: Counter[int | None] = Counter()
    for (depth, _), size in held.items():
        blocks[depth] += size
    for layer in layers:
        blocks[layer.depth] += 4 * layer.shape[0] * layer.shape[1]
    states = 4 * calibration.windows * calibration.context * min(shape for _, shape in widths)
    work = 2.0 * sum(layer.shape[0] * layer.shape[1] for layer in layers)
    work += sum(n * 2.0 * key[1] ** (2 if squares else 1) for key, n in inputs.items())
    held_bytes = max(blocks.values()) + 2 * states
    if calibration.kind == "fisher":  # a forward and a backward of the whole model
        work += 6.0 * sum(layer.shape[0] * layer.shape[1] for layer in layers)
        held_bytes = 4 * sum(layer.shape[0] * layer.shape[1] for layer in layers)
    speed = FLOPS.get(device.split(":")[0], FLOPS["cuda"])
    return CalibrationCost(
        seconds=calibration.tokens * work / speed,
        device_bytes=held_bytes,
        disk_bytes=sum(held.values()) // (2 if squares else 1),
    )


def refinement_seconds(
    calibration: Calibration, layers: Sequence[LayerInfo], refinement: Refinement, device: str
) -> float:
    """Estimate from shapes alone: a step costs three forwards, and each stage a few besides."""
    weights = sum(layer.shape[0] * layer.shape[1] for layer in layers)
    passes = sum(3 * stage.epochs + 4 for stage in refinement.stages)
    speed = FLOPS.get(device.split(":")[0], FLOPS["cuda"])
    return 2.0 * weights * calibration.tokens * passes / speed


def missing_data(what: str) -> str:
    """What to say where a method or refinement, key=value, needs text and there is none."""
    without = ", ".join(name for name, row in METHODS.items() if row.needs == "none")
    return (
        f"{what}: needs text to calibrate on. Give a file with --data (.txt, .raw or "
        f".jsonl, also .gz; not a test split). These do without: {without}."
    )


def read_statistics(
    statistics: Statistics, layers: Sequence[str], kind: str, device: torch.device
) -> ProblemStatistics:
    """The statistics of a batch, whose turn has come, as stacks on the device."""
    statistics.meet(layers)
    found = [statistics.read(layer, kind, device) for layer in layers]
    grams = [one.gram for one in found if one.gram is not None]
    rows = [one.fisher_rows for one in found if one.fisher_rows is not None]
    columns = [one.fisher_columns for one in found if one.fisher_columns is not None]
    drifts = [one.drift for one in found if one.drift is not None]
    return ProblemStatistics(
        mean_square=torch.stack([one.mean_square for one in found]),
        largest_mean=torch.stack([one.largest_mean for one in found]),
        gram=torch.stack(grams) if grams else None,
        tokens=tuple(one.tokens for one in found),
        dropped=tuple(one.dropped for one in found),
        fisher_rows=torch.stack(rows) if rows else None,
        fisher_columns=torch.stack(columns) if columns else None,
        drift=torch.stack(drifts) if drifts else None,
    )
