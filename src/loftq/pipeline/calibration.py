"""What a plan knows of its calibration: tokens, the place of statistics, what they cost."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
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
    """Statistics of all layers; 0 where they are taken in sequence, for this run alone."""

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
    calibration: Calibration, layers: Sequence[LayerInfo], device: str, *, rehearsals: float = 0
) -> CalibrationCost:
    """Estimate from shapes alone.

    In sequence the original and the quantized model run side by side, and a block runs once more
    for each of its batches (calibration/sequence.py); nothing is kept.

    Which layers share their input is known only when the model runs. Of n layers of one block with
    inputs of one width, half (rounded up) are taken to read an input of their own: q, k, v, o, gate
    and up read three, down its own.

    Args:
        calibration: tokens and kind of statistics.
        layers: that they are taken of.
        device: that runs.
        rehearsals: batches of a block; 0 = not in sequence.
    """
    inputs = _inputs(layers)
    squares = calibration.kind == "gram"
    held = {key: n * (4 * key[1] ** 2 if squares else 8 * key[1]) for key, n in inputs.items()}
    weights = sum(layer.shape[0] * layer.shape[1] for layer in layers)
    passes = 1 + 3 * (calibration.kind == "fisher")  # a forward and a backward of the whole model
    sides = 2 if rehearsals else 1  # the original model alone, or both
    sums = sum(n * 2.0 * key[1] ** (2 if squares else 1) for key, n in inputs.items())
    work = sides * (2.0 * weights * (passes + rehearsals) + sums)
    states = 4 * calibration.windows * calibration.context * min(width for _, width in inputs)
    at_once = _largest_block(layers, held) + 2 * states
    speed = FLOPS.get(device.split(":")[0], FLOPS["cuda"])
    return CalibrationCost(
        seconds=calibration.tokens * work / speed,
        device_bytes=4 * weights if calibration.kind == "fisher" else sides * at_once,
        disk_bytes=0 if rehearsals else sum(held.values()) // (2 if squares else 1),
    )


def _inputs(layers: Sequence[LayerInfo]) -> dict[tuple[int | None, int], int]:
    """(depth, width) -> inputs of that width in the block, half as many as there are layers."""
    widths = Counter((layer.depth, layer.shape[1]) for layer in layers)
    return {key: -(-count // 2) for key, count in widths.items()}


def _largest_block(layers: Sequence[LayerInfo], held: Mapping[tuple[int | None, int], int]) -> int:
    """Bytes of a block's float32 weights and its statistics."""
    blocks: Counter[int | None] = Counter()
    for (depth, _), size in held.items():
        blocks[depth] += size
    for layer in layers:
        blocks[layer.depth] += 4 * layer.shape[0] * layer.shape[1]
    return max(blocks.values())


def refinement_seconds(
    calibration: Calibration, layers: Sequence[LayerInfo], refinement: Refinement, device: str
) -> float:
    """Estimate from shapes alone."""
    weights = sum(layer.shape[0] * layer.shape[1] for layer in layers)
    blocks = len({layer.depth for layer in layers})
    passes = sum(stage.passes(blocks) for stage in refinement.stages)
    speed = FLOPS.get(device.split(":")[0], FLOPS["cuda"])
    return 2.0 * weights * calibration.tokens * passes / speed


def missing_data(what: str) -> str:
    """What to say where a method or refinement, key=value, needs text and there is none."""
    without = ", ".join(name for name, row in METHODS.items() if row.needs == "none")
    return (
        f"{what}: needs text to calibrate on. Give a file with --data (.txt, .raw or "
        f".jsonl, also .gz; not a test split). These methods do without, unless refined: {without}."
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
