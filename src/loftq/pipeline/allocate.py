"""Fill the table of costs: every layer in every candidate format, solved as it would be stored.

A candidate is one uniform plan of the same method, rank and seeds, carried out without writing. The
costs are what is left over, or what the model says of it, so a choice rests on the decomposition
that will be stored and not on rounding alone.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from math import prod

import torch
from torch import Tensor

from loftq.allocation import Choice, CostTable, choose, matches
from loftq.allocation.base import ResidualCost
from loftq.formats import FormatSpec
from loftq.pipeline.accounting import packed_bytes
from loftq.pipeline.calibration import Statistics, read_statistics
from loftq.pipeline.config import QuantizeConfig
from loftq.pipeline.layout import LayerInfo, ModelLayout
from loftq.pipeline.plan import Plan, Source
from loftq.pipeline.stream import oriented, solved_batches

Cost = Callable[[LayerInfo, Tensor], float]
"""(layer, Q + scaling B A of it, (out, in) float32 on the plan's device) -> cost."""
OnCost = Callable[[str, int, int], object]
"""Called after each cost: the layer, costs known, costs in all."""


def sharing_layers(config: QuantizeConfig, layout: ModelLayout) -> list[LayerInfo]:
    """The layers that share the budget: adapted, and not given a format by name."""
    return [
        info
        for info in layout.layers
        if info.adapted and not any(matches(pattern, info.module) for pattern in config.formats)
    ]


def uniform(config: QuantizeConfig, spec: FormatSpec) -> QuantizeConfig:
    """What costs are taken from: every layer in one format, by the method that measures."""
    return replace(config.cost_config(), format=str(spec), formats={})


def costs_fingerprint(config: QuantizeConfig, *, source: str, tokens: str, device: str) -> str:
    """Name of the costs of these weights under this method, whatever the candidates and budget.

    Args:
        config: the choices.
        source: fingerprint of the weights.
        tokens: of all text that costs or statistics were measured on, "" without any.
        device: kinds of device compute different last bits.
    """
    parts = [
        config.allocation,
        config.cost_config().resolved_method().choices(),
        config.rank,
        config.scale_fit,
        config.seed,
        source,
        tokens,
        device.split(":")[0],
        *([config.rotation] if config.rotation != "none" else []),
    ]
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:32]


def measure(
    table: CostTable,
    plans: Mapping[str, Plan],
    layers: Sequence[LayerInfo],
    source: Source,
    statistics: Statistics | None,
    cost: Cost,
    *,
    on_cost: OnCost = lambda layer, done, total: None,
) -> None:
    """Add the costs that the table lacks.

    Args:
        table: is added to, at once on disk.
        plans: format -> uniform plan.
        layers: to measure.
        source: the weights.
        statistics: of the inputs, for plans with a calibration.
        cost: of one layer as it would be stored.
        on_cost: progress.
    """
    names = [info.module for info in layers]
    total = len(names) * len(plans)
    done = total - sum(len(table.missing(names, name)) for name in plans)
    for name, plan in plans.items():
        missing = table.missing(names, name)
        batches = [b for b in plan.batches if any(x.info.module in missing for x in b.layers)]
        for solved in solved_batches(plan, batches, source, statistics):
            solution = solved.solution
            for i, layer in enumerate(solved.batch.layers):
                if layer.info.module not in missing:
                    continue
                product = plan.config.scaling * solution.lora_B[i] @ solution.lora_A[i]
                effective = solution.quantized[i].dequantize().to(product) + product
                table.add(layer.info.module, name, cost(layer.info, effective))
                done += 1
                on_cost(layer.info.module, done, total)


def residual_cost(
    plan: Plan, source: Source, statistics: Statistics | None, of_residual: ResidualCost
) -> Cost:
    """The cost of a layer by itself, under the statistics that its method is given."""
    kind = plan.calibration.kind if plan.calibration else None

    def cost(info: LayerInfo, effective: Tensor) -> float:
        W = oriented(source.read(info.tensor).to(effective), info)
        known = None
        if kind is not None and statistics is not None:
            known = read_statistics(statistics, [info.module], kind, effective.device)
        with torch.no_grad():
            return of_residual(W - effective, W, known)

    return cost


def decide(config: QuantizeConfig, layout: ModelLayout, table: CostTable) -> Choice:
    """The cheapest formats within `bits` per weight all told, from a full table.

    Raises:
        ValueError: the narrowest candidates take more.
    """
    layers, specs = sharing_layers(config, layout), config.candidate_formats()
    weights = sum(prod(info.shape) for info in layers)
    sizes = {x.module: {str(spec): packed_bytes(x, spec) for spec in specs} for x in layers}
    return choose(
        layers,
        sizes,
        table.costs,
        budget=int(config.bits * weights / 8),
        weights=weights,
        allocation=config.allocation,
    )
