"""A plan in numbers that a person decides by: bits, bytes, memory, time, and what is left alone."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass
from math import prod
from typing import Any

from loftq.pipeline.accounting import packed_bytes
from loftq.pipeline.layout import UNCOVERED
from loftq.pipeline.plan import Plan, PlannedLayer
from loftq.pipeline.serving import Serving, where_served

STAGED = 2  # batches whose results wait in host memory while the next is solved on a GPU


@dataclass(frozen=True, kw_only=True)
class LayerGroup:
    """Layers that differ only in their block."""

    name: str
    """Last part of their paths."""
    shape: tuple[int, int]
    format: str
    layers: int
    weights: int
    packed_bytes: int
    bits_per_weight: float


@dataclass(frozen=True, kw_only=True)
class Kept:
    """Weights that are copied as they are, for one reason."""

    reason: str
    modules: int
    parameters: int
    example: str
    """The first of the modules."""
    by_choice: bool
    """False where loftq cannot pack them: these count against the coverage of the model."""


@dataclass(frozen=True, kw_only=True)
class PlanReport:
    """What `loftq plan` says; bytes are exact, memory and seconds are estimates."""

    architecture: str
    method: str
    rank: int
    scaling: float
    device: str
    layers: tuple[dict[str, Any], ...]
    """An entry per layer: module, format, shape, rank, scale_fit, bits_per_weight, packed_bytes."""
    groups: tuple[LayerGroup, ...]
    kept: tuple[Kept, ...]
    serving: tuple[Serving, ...]
    coverage: float
    """Share of the linear weights in the blocks that is packed."""
    weights: int
    bits_per_weight: float
    packed_bytes: int
    unquantized_bytes: int
    adapter_bytes: int
    source_bytes: int
    source_at_16_bits: int
    """The same parameters at 2 bytes each, whatever the source stores."""
    disk_bytes: int
    """Weight files of the output, headers included."""
    loaded_bytes: int
    """Device memory of the loaded model with its start adapter, without activations."""
    solve_bytes: int
    """Memory of the largest batch, on the device that solves it."""
    host_bytes: int
    """Anonymous host memory while quantizing, above the interpreter with its libraries."""
    seconds: float
    """Rough time of the solve, from speeds measured elsewhere; reading and writing come on top."""
    calibration: dict[str, Any] | None = None
    """Tokens and statistics of a method that needs text, and what taking them costs: seconds,
    device_bytes, disk_bytes."""
    allocation: dict[str, Any] | None = None
    """What a measured allocation chose: budget, nbytes, cost, formats, rivals."""
    refinement_seconds: float = 0.0
    """Rough time of gradients on the adapters; 0 where there are none."""

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready."""
        return asdict(self)


def describe_plan(plan: Plan) -> PlanReport:
    """Everything `loftq plan` prints about a plan."""
    return PlanReport(
        architecture=plan.layout.architecture,
        method=plan.config.method,
        rank=plan.config.rank,
        scaling=plan.config.scaling,
        device=plan.device,
        layers=tuple(_entry(layer) for layer in plan.layers),
        groups=_groups(plan.layers),
        kept=_kept(plan),
        serving=where_served(plan),
        coverage=plan.layout.coverage,
        weights=plan.weights,
        bits_per_weight=plan.bits_per_weight,
        packed_bytes=plan.packed_bytes,
        unquantized_bytes=plan.copied_bytes,
        adapter_bytes=plan.adapter_bytes,
        source_bytes=plan.source_bytes,
        source_at_16_bits=2 * (plan.weights + sum(prod(spec.shape) for spec in plan.copied)),
        disk_bytes=plan.disk_bytes,
        loaded_bytes=plan.packed_bytes + plan.copied_bytes + plan.adapter_bytes,
        solve_bytes=plan.working_bytes,
        host_bytes=_host_bytes(plan),
        seconds=plan.seconds,
        calibration=_calibration(plan),
        allocation=plan.choice.to_dict() if plan.choice else None,
        refinement_seconds=plan.refinement_seconds,
    )


def _calibration(plan: Plan) -> dict[str, Any] | None:
    cost = plan.calibration_cost
    if plan.calibration is None or cost is None:
        return None
    return {**plan.calibration.to_dict(), **cost.to_dict()}


def _entry(layer: PlannedLayer) -> dict[str, Any]:
    size = packed_bytes(layer.info, layer.spec)
    return {
        "module": layer.info.module,
        "kind": layer.info.kind,
        "format": str(layer.spec),
        "rival": str(layer.rival) if layer.rival else None,
        "scale_fit": layer.scale_fit,
        "shape": list(layer.info.shape),
        "rank": layer.rank,
        "bits_per_weight": 8 * size / layer.weights,
        "packed_bytes": size,
    }


def _groups(layers: Iterable[PlannedLayer]) -> tuple[LayerGroup, ...]:
    found: dict[tuple[str, tuple[int, int], str], list[PlannedLayer]] = {}
    for layer in layers:
        key = (layer.info.module.rsplit(".", 1)[-1], layer.info.shape, str(layer.spec))
        found.setdefault(key, []).append(layer)
    groups = []
    for (name, shape, spec), members in found.items():
        size = sum(packed_bytes(layer.info, layer.spec) for layer in members)
        weights = sum(layer.weights for layer in members)
        groups.append(
            LayerGroup(
                name=name,
                shape=shape,
                format=spec,
                layers=len(members),
                weights=weights,
                packed_bytes=size,
                bits_per_weight=8 * size / weights,
            )
        )
    return tuple(groups)


def _kept(plan: Plan) -> tuple[Kept, ...]:
    reasons: dict[str, list[Any]] = {}
    for kept in plan.layout.kept:
        reasons.setdefault(kept.reason, []).append(kept)
    return tuple(
        Kept(
            reason=reason,
            modules=len(members),
            parameters=sum(kept.parameters for kept in members),
            example=members[0].module,
            by_choice=reason not in UNCOVERED,
        )
        for reason, members in reasons.items()
    )


def _host_bytes(plan: Plan) -> int:
    """On a CPU the batch is solved here; on a GPU only its packed results pass through."""
    if plan.device.split(":")[0] == "cpu":
        return plan.working_bytes
    return STAGED * max(
        sum(packed_bytes(x.info, x.spec) + 4 * x.rank * sum(x.info.shape) for x in batch.layers)
        for batch in plan.batches
    )
