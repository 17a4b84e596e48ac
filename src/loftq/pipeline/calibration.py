"""What a plan knows of its calibration: tokens, the place of statistics, what they cost."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Protocol

import torch

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
    """Statistics that the method needs: diagonal or gram."""
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
    """One block, its statistics and the hidden states of all tokens."""
    disk_bytes: int
    """Statistics of all layers."""

    def to_dict(self) -> dict[str, object]:
        """JSON-ready."""
        return asdict(self)


class Statistics(Protocol):
    """Where statistics are read from; `calibration.StatisticsStore` is one."""

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
    speed = FLOPS.get(device.split(":")[0], FLOPS["cuda"])
    return CalibrationCost(
        seconds=calibration.tokens * work / speed,
        device_bytes=max(blocks.values()) + 2 * states,
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
    """The statistics of a batch as stacks on the device."""
    found = [statistics.read(layer, kind, device) for layer in layers]
    grams = [one.gram for one in found if one.gram is not None]
    return ProblemStatistics(
        mean_square=torch.stack([one.mean_square for one in found]),
        largest_mean=torch.stack([one.largest_mean for one in found]),
        gram=torch.stack(grams) if grams else None,
        tokens=tuple(one.tokens for one in found),
        dropped=tuple(one.dropped for one in found),
    )
