"""Everything decided before the first weight is read: formats, batches, files, bytes, seconds.

A plan is a pure function of the configuration, the model's layout and the source's headers. It
fixes which weights are solved together and from which seeds, so it is the unit of resume.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Protocol

import torch
from torch import Tensor

from loftq.allocation import Choice, assign_formats, first_k_blocks
from loftq.checkpoint import ShardFile, TensorEntry, TensorSpec, plan_shards
from loftq.formats import FormatSpec, component_shapes, default_fit, fits_of, parse_format
from loftq.ops.reference import PER_TENSOR
from loftq.pipeline.accounting import adapter_parameters
from loftq.pipeline.calibration import (
    Calibration,
    CalibrationCost,
    calibration_cost,
    missing_data,
    refinement_seconds,
)
from loftq.pipeline.config import TABLE_FORMAT, QuantizeConfig
from loftq.pipeline.layout import UNCOVERED, LayerInfo, ModelLayout
from loftq.transforms import largest_block, rotated

OUTPUTS = frozenset({"o", "o_proj", "out_proj", "c_proj", "dense", "wo", "out_lin"})
"""Last names of the projections that leave an attention or a feed-forward."""
FLOATS = ("F32", "F16", "BF16", "F64")
SHARD_PREFIX = "loftq"
ADAPTER_PREFIX = "base_model.model."
TRAINED_HEADS = {
    "SEQ_CLS": ("classifier", "score"),
    "TOKEN_CLS": ("classifier", "score"),
    "QUESTION_ANS": ("qa_outputs",),
}
"""Heads that PEFT trains and stores with an adapter of a task."""
ADAPTER_FILE = "init_adapter/adapter_model.safetensors"
MAX_UNCOVERED = 0.2
SHOWN = 20  # problems that a message lists
CPU_BATCH, GPU_BATCH = 1 << 22, 1 << 27
"""Most weights in a batch: bounds working memory, and fills a large GPU."""
ROUNDED_AT_ONCE = 1 << 22
"""Weights of a layer without an adapter that are rounded at a time: whole rows of it."""
SOLVED_AT_ONCE = 3  # batches, on a GPU: one reads, one waits for the host, one computes
WORKING_BYTES = 45  # of memory for each weight being solved, measured
CPU_GRAM_BATCH = 1 << 24
"""The same where columns are rounded one by one: a column costs the same for many weights."""
GRAM_LOAD = 2  # weights that one element of a Gram counts for: float64, several copies
NANOSECONDS = {"cpu": 115.0, "cuda": 0.37}
"""Measured time of one alternation per weight at rank 64 (docs/benchmarks.md); plans only."""


class Source(Protocol):
    """Where weights come from: a checkpoint, or a model in memory."""

    @property
    def tensors(self) -> Mapping[str, TensorEntry]:
        """Name -> dtype and shape of every tensor."""

    def read(self, name: str) -> Tensor:
        """One tensor."""

    def fingerprint(self) -> str:
        """Identity of the contents."""


class PlanError(ValueError):
    """A plan that cannot be carried out; the message lists every problem at once."""


@dataclass(frozen=True, kw_only=True)
class PlannedLayer:
    """One weight, its format and its own seed."""

    info: LayerInfo
    spec: FormatSpec
    scale_fit: str
    seed: int
    rank: int
    """Of its adapter; 0 = none, the weight is only rounded."""
    rival: FormatSpec | None = None
    """Format of the same size that it is tried in as well; the one with the smaller error stays."""

    @property
    def weights(self) -> int:
        """Number of weights."""
        return self.info.shape[0] * self.info.shape[1]

    @property
    def stem(self) -> str:
        """Name of the weight in the checkpoint without `.weight`: packed tensors append to it."""
        return self.info.tensor.removesuffix(".weight")

    def packed(self) -> list[TensorSpec]:
        """The packed tensors this layer is stored as."""
        shapes = component_shapes(self.spec, self.info.shape)
        return [TensorSpec(f"{self.stem}.{part}", "U8", shape) for part, shape in shapes.items()]


@dataclass(frozen=True, kw_only=True)
class Batch:
    """Same-shape weights that are solved together."""

    name: str
    layers: tuple[PlannedLayer, ...]
    gram: bool = False
    """Whether the method needs the Gram of their inputs; layers without an adapter never do."""

    @property
    def working_bytes(self) -> int:
        """Memory while it is solved; layers without an adapter go by panels of rows."""
        if self.layers[0].rank:
            return WORKING_BYTES * sum(_load(layer, self.gram) for layer in self.layers)
        weights = sum(layer.weights for layer in self.layers)
        packed = sum(spec.nbytes for layer in self.layers for spec in layer.packed())
        return packed + WORKING_BYTES * min(weights, ROUNDED_AT_ONCE)


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What will be done, file by file."""

    config: QuantizeConfig
    layout: ModelLayout
    layers: tuple[PlannedLayer, ...]
    batches: tuple[Batch, ...]
    copied: tuple[TensorSpec, ...]
    """Tensors that go to the output as they are."""
    shards: tuple[ShardFile, ...]
    """Output files: backbone shards, then the adapter file."""
    source_fingerprint: str
    source_bytes: int
    device: str
    calibration: Calibration | None = None
    """Tokens and statistics; None for methods that need none."""
    choice: Choice | None = None
    """What a measured allocation chose; None where formats go by depth and name alone."""

    @cached_property
    def fingerprint(self) -> str:
        """Identity of input, settings and batches: a resume needs the same."""
        return hashlib.sha256(json.dumps(self.describe(), sort_keys=True).encode()).hexdigest()

    def describe(self) -> dict[str, object]:
        """What the fingerprint covers, JSON-ready, so that a refusal can say what differs."""
        return {
            **{f"config.{k}": _plain(v) for k, v in self.config.to_dict().items()},
            "source": self.source_fingerprint,
            "device": self.device.split(":")[0],
            "machine": _machine(self.device),
            "batches": [[layer.info.module for layer in b.layers] for b in self.batches],
            "formats": {layer.info.module: str(layer.spec) for layer in self.layers},
            "ranks": {layer.info.module: layer.rank for layer in self.layers},
            "statistics": self.calibration.fingerprint if self.calibration else "",
        }

    @property
    def weights(self) -> int:
        """Quantized weights."""
        return sum(layer.weights for layer in self.layers)

    @property
    def packed_bytes(self) -> int:
        """Bytes of the packed tensors."""
        return sum(spec.nbytes for layer in self.layers for spec in layer.packed())

    @property
    def copied_bytes(self) -> int:
        """Bytes of everything that is not quantized."""
        return sum(spec.nbytes for spec in self.copied)

    @property
    def adapter_bytes(self) -> int:
        """Bytes of the adapters, float32 on disk."""
        return sum(entry.nbytes for entry in self.shards[-1].tensors.values())

    @property
    def heads(self) -> tuple[TensorSpec, ...]:
        """Tensors of the task head, which the adapter file holds too, in float32."""
        modules = TRAINED_HEADS.get(self.layout.task_type or "", ())
        return tuple(spec for spec in self.copied if spec.name.split(".")[0] in modules)

    @property
    def disk_bytes(self) -> int:
        """Size of every weight file, headers included."""
        return sum(shard.nbytes for shard in self.shards)

    @property
    def bits_per_weight(self) -> float:
        """Of the quantized weights, scales and zeros included, adapters not."""
        return 8 * self.packed_bytes / self.weights

    @property
    def seconds(self) -> float:
        """Rough time of the solve on this device; reading and writing come on top."""
        method, kind = self.config.resolved_method(), self.device.split(":")[0]
        steps = max(1, method.iterations) * method.step_cost
        rounds = sum(
            layer.weights * (steps if layer.rank else 1) * (2 if layer.rival else 1)
            for layer in self.layers
        )
        return rounds * NANOSECONDS.get(kind, NANOSECONDS["cuda"]) * 1e-9

    @property
    def calibration_cost(self) -> CalibrationCost | None:
        """Of taking the statistics, where they are not kept from an earlier run."""
        if self.calibration is None:
            return None
        infos = [layer.info for layer in self.layers if layer.rank]
        rehearsals = 0.0
        if self.config.resolved_method().sequential:
            rehearsals = sum(b.gram for b in self.batches) / max(1, self.layout.blocks)
        return calibration_cost(self.calibration, infos, self.device, rehearsals=rehearsals)

    @property
    def refinement_seconds(self) -> float:
        """Rough time of the refinement on this device; 0 where there is none."""
        if self.calibration is None:
            return 0.0
        infos = [layer.info for layer in self.layers if layer.rank]
        return refinement_seconds(self.calibration, infos, self.config.refinement(), self.device)

    @property
    def working_bytes(self) -> int:
        """Memory of the largest batches while they are solved, on the device that solves them."""
        sizes = sorted(batch.working_bytes for batch in self.batches)
        return sum(sizes[-self.solved_at_once :])

    @property
    def solved_at_once(self) -> int:
        """Batches in flight. Rounding column by column keeps the host busy by itself."""
        busy = _needs_gram(self.config) or not self.device.startswith("cuda")
        return 1 if busy else SOLVED_AT_ONCE

    @property
    def largest_rank(self) -> int:
        """Of the adapters."""
        return max(layer.rank for layer in self.layers)

    @property
    def adapter_parameters(self) -> int:
        """Parameters of all LoRA factors."""
        return sum(adapter_parameters(layer.info, layer.rank) for layer in self.layers)


def make_plan(
    config: QuantizeConfig,
    layout: ModelLayout,
    source: Source,
    *,
    device: str = "cpu",
    max_shard_bytes: int = 5_000_000_000,
    calibration: Calibration | None = None,
    choice: Choice | None = None,
) -> Plan:
    """Plan the quantization of a checkpoint; reads nothing but its headers.

    Args:
        config: the choices.
        layout: of the model.
        source: its weights.
        device: that solves.
        max_shard_bytes: size at which the weights are split over files.
        calibration: tokens and statistics; not looked at by methods that need none.
        choice: of a configuration with a measured allocation (pipeline/allocate.py).

    Raises:
        PlanError: anything that would fail later, all of it at once.
    """
    specs = planned_formats(config, layout, choice)
    problems = _problems(config, layout, source, specs)
    if config.resolved_method().needs == "none":
        calibration = None
    else:
        problems += _unmet(config, layout, calibration)
    if problems:
        more = [f"... and {len(problems) - SHOWN} more."] if len(problems) > SHOWN else []
        raise PlanError("\n".join([*problems[:SHOWN], *more]))
    ranks = choice.ranks if choice else {}
    layers = tuple(
        PlannedLayer(
            info=info,
            spec=specs[info.module],
            scale_fit=_fit(config, info, specs[info.module]),
            seed=_seed(config.seed, info.module),
            rank=ranks.get(info.module, config.rank) if info.adapted else 0,
            rival=_rival(config, info, specs[info.module]),
        )
        for info in layout.layers
    )
    gram, method = _needs_gram(config), config.resolved_method()
    limit = _batch_limit(device, gram)
    stored, copied = _stored(layers, source)
    plan = Plan(
        config=config,
        layout=layout,
        layers=layers,
        batches=in_sequence(layers) if method.sequential else _batches(layers, limit, gram=gram),
        copied=tuple(copied),
        shards=(),
        source_fingerprint=source.fingerprint(),
        source_bytes=sum(entry.nbytes for entry in source.tensors.values()),
        device=device,
        calibration=calibration,
        choice=choice,
    )
    shards = plan_shards(stored, prefix=SHARD_PREFIX, max_shard_bytes=max_shard_bytes)
    return replace(plan, shards=(*shards, ShardFile.plan(ADAPTER_FILE, _adapter_tensors(plan))))


def _stored(
    layers: Sequence[PlannedLayer], source: Source
) -> tuple[list[TensorSpec], list[TensorSpec]]:
    """Tensors of the backbone in the source's order, and those among them that are copied."""
    by_tensor = {layer.info.tensor: layer for layer in layers}
    stored: list[TensorSpec] = []
    copied: list[TensorSpec] = []
    for entry in source.tensors.values():
        if entry.name in by_tensor:
            stored += by_tensor[entry.name].packed()
        else:
            copied.append(TensorSpec(entry.name, entry.dtype, entry.shape))
            stored.append(copied[-1])
    return stored, copied


def _adapter_tensors(plan: Plan) -> list[TensorSpec]:
    """Tensors of the adapter file, under PEFT's names."""
    tensors = []
    for layer in plan.layers:
        rank = layer.rank
        if not rank:
            continue
        name_a, name_b = adapter_names(layer.info)
        out_features, in_features = layer.info.shape
        if layer.info.kind == "embedding":
            # PEFT's embedding adapter is the transpose: A (rank, tokens), B (width, rank).
            tensors.append(TensorSpec(name_a, "F32", (rank, out_features)))
            tensors.append(TensorSpec(name_b, "F32", (in_features, rank)))
        else:
            tensors.append(TensorSpec(name_a, "F32", (rank, in_features)))
            tensors.append(TensorSpec(name_b, "F32", (out_features, rank)))
    heads = (TensorSpec(ADAPTER_PREFIX + spec.name, "F32", spec.shape) for spec in plan.heads)
    return [*tensors, *heads]


def adapter_names(info: LayerInfo) -> tuple[str, str]:
    """Names of A and B in a PEFT adapter file."""
    prefix = f"{ADAPTER_PREFIX}{info.module}."
    if info.kind == "embedding":
        return prefix + "lora_embedding_A", prefix + "lora_embedding_B"
    return prefix + "lora_A.weight", prefix + "lora_B.weight"


def planned_formats(
    config: QuantizeConfig, layout: ModelLayout, choice: Choice | None = None
) -> dict[str, FormatSpec]:
    """Format of every layer: tables in 8 bits, the rest by depth, choice and the user's patterns.

    A measured allocation must come with what it chose (pipeline/allocate.py).
    """
    measured = config.allocation_row().measured
    assert not measured or choice is not None, f"allocation={config.allocation} without its choice"
    default = config.default_format()
    overrides = {pattern: parse_format(name) for pattern, name in config.formats.items()}
    tables = {info.module: config.table_format() for info in layout.layers if not info.adapted}
    first = None
    by_depth = not measured and config.format is None and config.engine is None
    if by_depth and config.bits not in (2, 3, 4):
        first = (first_k_blocks(config.bits, layout.blocks), config.wide_format())
    chosen = (
        {module: parse_format(name) for module, name in choice.formats.items()} if choice else {}
    )
    specs = assign_formats(
        layout.layers, default, first=first, chosen=chosen, overrides={**tables, **overrides}
    )
    if config.rotation != "all":
        return specs
    turned = {x.module: rotated(specs[x.module], x.shape[1]) for x in layout.layers if _turns(x)}
    return {**specs, **turned}


def _turns(info: LayerInfo) -> bool:
    """Whether a layer has inputs that can be rotated; an embedding has none."""
    return info.adapted and info.kind != "embedding"


def _rival(config: QuantizeConfig, info: LayerInfo, spec: FormatSpec) -> FormatSpec | None:
    """The format that `rotation=auto` tries beside `spec`; None where there is nothing to try."""
    if config.rotation != "auto" or not _turns(info) or spec.rotation:
        return None
    turned = rotated(spec, info.shape[1])
    return None if turned == spec else turned


def _problems(
    config: QuantizeConfig, layout: ModelLayout, source: Source, specs: Mapping[str, FormatSpec]
) -> list[str]:
    problems = []
    if not layout.layers:
        problems.append(
            f"{layout.architecture}: found no linear weight to quantize. Name them with "
            "targets=[...]; `loftq plan MODEL` lists what there is."
        )
    elif not any(info.adapted for info in layout.layers):
        problems.append(
            f"{layout.architecture}: {', '.join(info.module for info in layout.layers)} would be "
            "packed without an adapter, and nothing else is chosen, so that nothing could be "
            "fine-tuned. Name layers of the blocks in targets too, or leave targets out."
        )
    for info in layout.layers:
        entry = source.tensors[info.tensor]
        if info.adapted and config.rank > min(info.shape):
            problems.append(
                f"{info.module}: rank={config.rank} exceeds min{info.shape} = {min(info.shape)}. "
                f'Lower the rank or leave the layer out with skip=["{info.module}"].'
            )
        if info.adapted and (config.design_rank or 0) > min(info.shape):
            problems.append(
                f"{info.module}: design_rank={config.design_rank} exceeds min{info.shape} = "
                f"{min(info.shape)}. Lower it, or leave it out to use the rank."
            )
        spec = specs[info.module]
        if (fit := _fit(config, info, spec)) not in fits_of(spec):
            problems.append(
                f"{info.module}: {spec} has no scale_fit={fit}; choose one of "
                f"{', '.join(fits_of(spec))}. `entropy` needs the stored zero of a format such as "
                "int4-g64, `sigma` the grids even and uniform."
            )
        if not info.adapted and (spec.scale_coding == "dq" or spec.group_size == PER_TENSOR):
            problems.append(
                f"{info.module}: {spec} stores scales over several rows, and a table without an "
                f"adapter is rounded row by row. Choose f16, bf16 or f32 scales, as {TABLE_FORMAT}."
            )
        problems += _unturnable(config, info, spec)
        if entry.dtype not in FLOATS:
            problems.append(
                f"{info.tensor}: dtype {entry.dtype} is not a float; the source looks quantized "
                "already. Start from the original 16- or 32-bit model."
            )
    missed = 1 - layout.coverage
    if layout.layers and missed > MAX_UNCOVERED and not config.allow_uncovered:
        reasons = sorted({kept.reason for kept in layout.kept} & UNCOVERED)
        problems.append(
            f"{layout.architecture}: {missed:.0%} of the linear weights would stay 16-bit "
            f"({', '.join(reasons)}). Accept that with --allow-uncovered."
        )
    return problems


def _unturnable(config: QuantizeConfig, info: LayerInfo, spec: FormatSpec) -> list[str]:
    """Rotations that a layer cannot have."""
    if spec.rotation and not _turns(info):
        return [f"{info.module}: {spec} rotates the inputs of a layer, and a table has none."]
    if spec.rotation and info.shape[1] % spec.rotation:
        most = largest_block(info.shape[1])
        found = f"{most} fit" if most else "none fit"
        return [
            f"{info.module}: {spec} rotates blocks of {spec.rotation} inputs, and of "
            f"{info.shape[1]}, {found}. Choose another format for it with formats=..."
        ]
    if config.rotation == "all" and _turns(info) and not spec.rotation:
        found = f"{info.shape[1]} inputs are not whole blocks of 16"
        if spec.group_size == PER_TENSOR:
            found = f"{spec} is stored unrotated"
        return [
            f"{info.module}: rotation=all: {found}. Choose rotation=auto, or leave the layer out "
            f'with skip=["{info.module}"].'
        ]
    return []


def _unmet(
    config: QuantizeConfig, layout: ModelLayout, calibration: Calibration | None
) -> list[str]:
    """What a method that needs statistics lacks."""
    problems = []
    if calibration is None:
        problems.append(missing_data(config.text_reader))
    if config.resolved_method().needs == "fisher" and layout.task_type != "CAUSAL_LM":
        problems.append(
            f"{layout.architecture}: {config.method} weighs by gradients of the next token's loss, "
            "and this model predicts none. Choose a method that reads inputs only, such as fast."
        )
    if config.resolved_method().sequential:
        problems += [
            f"{info.module}: lies outside of the blocks, where {config.method} has no sequence to "
            f'follow. Leave it out with skip=["{info.module}"], or choose fast.'
            for info in layout.layers
            if info.adapted and info.depth is None
        ]
    embedded = [x.module for x in layout.layers if x.kind == "embedding" and x.adapted]
    if embedded:
        problems.append(
            f"{embedded[0]}: an embedding has no inputs to calibrate on. Leave embeddings=true "
            f"out, or {config.text_reader} for a choice that needs no text."
        )
    return problems


def _needs_gram(config: QuantizeConfig) -> bool:
    return config.resolved_method().needs == "gram"


def _load(layer: PlannedLayer, gram: bool) -> int:
    """Weights of a layer, its Gram counted as if it were weights."""
    return layer.weights + (GRAM_LOAD * layer.info.shape[1] ** 2 if gram else 0)


def _fit(config: QuantizeConfig, info: LayerInfo, spec: FormatSpec) -> str:
    fit = config.scale_fit or config.resolved_method().scale_fit
    if not info.adapted and fit not in fits_of(spec):
        return default_fit(spec)  # what is chosen for the layers need not exist for a table
    if config.scale_fit is None and fit == "absmax" and spec.grid in ("even", "uniform"):
        return "sigma"  # the papers' rule for these grids
    return fit or default_fit(spec)


def _seed(seed: int, module: str) -> int:
    digest = hashlib.sha256(f"{seed}:{module}".encode()).digest()
    return int.from_bytes(digest[:7], "little")


def _batches(layers: tuple[PlannedLayer, ...], limit: int, *, gram: bool) -> tuple[Batch, ...]:
    """Layers of one shape, format, kind and rank, in model order, cut at `limit` weights."""
    groups: dict[tuple[object, ...], list[list[PlannedLayer]]] = {}
    for layer in layers:
        info = layer.info
        key: tuple[object, ...] = (info.shape, layer.spec, layer.scale_fit, info.kind, layer.rank)
        key += () if layer.rank else (info.module,)  # a large table is a batch of its own
        runs = groups.setdefault(key, [[]])
        if runs[-1] and (len(runs[-1]) + 1) * _load(layer, gram) > limit:
            runs.append([])
        runs[-1].append(layer)
    batches = [tuple(run) for runs in groups.values() for run in runs]
    return tuple(
        Batch(name=f"batch-{k:05d}", layers=run, gram=gram and run[0].rank > 0)
        for k, run in enumerate(batches, 1)
    )


def in_sequence(layers: Sequence[PlannedLayer]) -> tuple[Batch, ...]:
    """Batches in the order of the forward; each is solved with all before it quantized.

    A batch holds neighbours of one block, module, shape, format and rank, as queries, keys and
    values.
    The output of an attention reads what comes of those, whatever its shape, so it starts anew.
    """
    order = sorted(
        (layer for layer in layers if layer.rank), key=lambda layer: layer.info.depth or 0
    )
    runs: list[tuple[object, list[PlannedLayer]]] = []
    for layer in order:
        parent, _, name = layer.info.module.rpartition(".")
        shape, rank = layer.info.shape, layer.rank
        key = (parent, shape, layer.spec, layer.scale_fit, rank, name in OUTPUTS)
        if not runs or runs[-1][0] != key:
            runs.append((key, []))
        runs[-1][1].append(layer)
    tables = [[layer] for layer in layers if not layer.rank]
    return tuple(
        Batch(name=f"batch-{k:05d}", layers=tuple(run), gram=run[0].rank > 0)
        for k, run in enumerate([*(run for _, run in runs), *tables], 1)
    )


def _batch_limit(device: str, gram: bool) -> int:
    """Weights per batch: all that are in flight fill half of a small GPU, at most GPU_BATCH."""
    if not device.startswith("cuda"):
        return CPU_GRAM_BATCH if gram else CPU_BATCH
    if not torch.cuda.is_available():
        return GPU_BATCH  # a plan for another machine
    memory = torch.cuda.get_device_properties(device).total_memory
    return min(GPU_BATCH, memory // (2 * SOLVED_AT_ONCE * WORKING_BYTES))


def _machine(device: str) -> str:
    """What decides the last bits of a result beside the inputs: torch, and the model of the GPU."""
    if not device.startswith("cuda") or not torch.cuda.is_available():
        return f"torch {torch.__version__}"
    return f"torch {torch.__version__}, {torch.cuda.get_device_name(device)}"


def _plain(value: object) -> object:
    return dict(value) if isinstance(value, Mapping) else value
