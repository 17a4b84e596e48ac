"""Fill the tables of costs: every layer in every candidate format, solved as it would be stored.

A candidate is one uniform plan of the same method and seeds, carried out without writing; each rank
has a table of its own. The costs are what is left over, or what the model says of it, so a choice
rests on the decomposition that will be stored and not on rounding alone.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from math import prod
from typing import NamedTuple

import torch
from torch import Tensor

from loftq.allocation import Candidate, Choice, CostTable, choose, matches
from loftq.allocation.base import ResidualCost
from loftq.formats import FormatSpec
from loftq.pipeline.accounting import adapter_parameters, packed_bytes
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


def uniform(config: QuantizeConfig, spec: FormatSpec, rank: int) -> QuantizeConfig:
    """What costs are taken from: every layer in one format, by the method that measures."""
    return replace(config.cost_config(), format=str(spec), formats={}, rank=rank)


def costs_fingerprint(
    config: QuantizeConfig, rank: int, *, source: str, tokens: str, device: str
) -> str:
    """Name of the costs of these weights under this method, whatever the candidates and budget.

    Args:
        config: the choices.
        rank: of every adapter.
        source: fingerprint of the weights.
        tokens: of all text that costs or statistics were measured on, "" without any.
        device: kinds of device compute different last bits.
    """
    parts = [
        config.allocation,
        config.cost_config().resolved_method().choices(),
        rank,
        config.scale_fit,
        config.seed,
        source,
        tokens,
        device.split(":")[0],
        *([config.rotation] if config.rotation != "none" else []),
    ]
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:32]


class Gaps(NamedTuple):
    """A format whose costs a table lacks for some layers."""

    table: CostTable
    format: str
    plan: Plan
    """Of that format for every layer, at the rank of the table."""


def measure(
    gaps: Sequence[Gaps],
    layers: Sequence[LayerInfo],
    source: Source,
    statistics: Statistics | None,
    cost: Cost,
    *,
    on_cost: OnCost = lambda layer, done, total: None,
) -> None:
    """Add the costs that the tables lack, at once on disk.

    Args:
        gaps: the tables and what to fill them from.
        layers: to measure.
        source: the weights.
        statistics: of the inputs, for plans with a calibration.
        cost: of one layer as it would be stored.
        on_cost: progress.
    """
    names = [info.module for info in layers]
    total = len(names) * len(gaps)
    done = total - sum(len(gap.table.missing(names, gap.format)) for gap in gaps)
    for table, name, plan in gaps:
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


def decide(config: QuantizeConfig, layout: ModelLayout, tables: Mapping[int, CostTable]) -> Choice:
    """The cheapest formats and ranks within the budget, from full tables, one for each rank.

    The budget is `bits` per weight all told. Where ranks are chosen, the adapters count too, and it
    grows by what adapters of `rank` everywhere would take.

    Raises:
        ValueError: the smallest candidates take more.
    """
    layers, weighed = sharing_layers(config, layout), bool(config.ranks)
    weights = sum(prod(info.shape) for info in layers)
    options = {
        Candidate(str(spec), rank if weighed else None): (spec, rank)
        for spec in config.candidate_formats()
        for rank in tables
    }

    def size(info: LayerInfo, spec: FormatSpec, rank: int) -> int:
        return packed_bytes(info, spec) + (adapter_bytes(info, rank) if weighed else 0)

    sizes = {x.module: {o: size(x, *parts) for o, parts in options.items()} for x in layers}
    costs = {
        x.module: {o: tables[rank].costs[x.module][o.format] for o, (_, rank) in options.items()}
        for x in layers
    }
    adapters = sum(adapter_bytes(info, config.rank) for info in layers) if weighed else 0
    return choose(
        layers,
        sizes,
        costs,
        budget=int(config.bits * weights / 8) + adapters,
        weights=weights,
        allocation=config.allocation,
    )


def adapter_bytes(info: LayerInfo, rank: int) -> int:
    """Bytes of A and B at 16 bits a number, as they are served."""
    return 2 * adapter_parameters(info, rank)
