"""A layer without an adapter: rounded to nearest, a panel of rows at a time.

Embeddings and heads are the largest weights of a model, and nothing about them is solved: each row
is rounded by itself, so that working memory does not grow with the vocabulary.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from loftq.formats import COMPONENTS, QuantizedTensor
from loftq.methods import LayerRecord, LayerSolution
from loftq.pipeline.plan import ROUNDED_AT_ONCE, Plan, PlannedLayer, Source
from loftq.rounding import round_to_nearest

LARGEST = 1e15  # magnitude of a weight: the squares of a whole matrix still add up in float32
ROUNDING = "rounding"
"""What the record of such a layer names as its method."""


def round_layer(
    plan: Plan, layer: PlannedLayer, source: Source, device: torch.device
) -> LayerSolution:
    """The packed weight of one layer with factors of rank 0; its record's error is exact.

    Raises:
        ValueError: the weight holds NaN, infinity or a value beyond LARGEST; the tensor is named.
    """
    weight = source.read(layer.info.tensor)
    rows, columns = layer.info.shape
    parts: list[QuantizedTensor] = []
    sums = torch.zeros(
        2, dtype=torch.float64, device=device
    )  # of the squared difference, of the squared weight
    step = max(1, ROUNDED_AT_ONCE // columns)
    for start in range(0, rows, step):
        W = weight[start : start + step].to(device).float()
        if bad := int((~(W.abs() <= LARGEST)).sum()):
            raise not_usable(layer, bad)
        rounded, values = round_to_nearest(W[None], layer.spec, fit=layer.scale_fit)
        parts.append(rounded.pack(0))
        sums += torch.stack([(W - values[0]).double().square().sum(), W.double().square().sum()])
    difference, norm = sums.tolist()
    error = math.sqrt(difference / norm) if norm else math.sqrt(difference)
    return LayerSolution(
        quantized=(_joined(layer, parts),),
        lora_A=torch.zeros(1, 0, columns),
        lora_B=torch.zeros(1, rows, 0),
        records=(_record(plan, layer, error),),
    )


def not_usable(layer: PlannedLayer, bad: int) -> ValueError:
    """The refusal of a weight with `bad` values that are no numbers, or beyond LARGEST."""
    rows, columns = layer.info.shape
    return ValueError(
        f"{layer.info.tensor}: {bad} of {rows * columns} values are NaN or infinite, or beyond "
        f"{LARGEST:.0e}. Repair the source, or keep the layer at 16 bits with "
        f'skip=["{layer.info.module}"].'
    )


def _joined(layer: PlannedLayer, parts: list[QuantizedTensor]) -> QuantizedTensor:
    """One packed weight of panels of its rows; every component has a row per row."""
    stacks: dict[str, Tensor] = {
        name: torch.cat([getattr(part, name) for part in parts])
        for name in COMPONENTS
        if getattr(parts[0], name) is not None
    }
    return QuantizedTensor.from_state_dict(layer.spec, layer.info.shape, stacks)


def _record(plan: Plan, layer: PlannedLayer, error: float) -> LayerRecord:
    return LayerRecord(
        name=layer.info.module,
        method=ROUNDING,
        format=str(layer.spec),
        scale_fit=layer.scale_fit,
        rank=0,
        scaling=plan.config.scaling,
        solver="none",
        plain_error=error,
        error=error,
        errors=(),
        kept=0,
        bits_per_weight=layer.spec.bits_per_weight(*layer.info.shape),
    )
