"""Carry out a plan: stream batches of weights in, solve them, stream packed tensors out.

What is solved (pipeline/stream.py) is written while the next batches are, a batch at a time by
several threads: the hash of a tensor takes longer than writing it.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from loftq.calibration import Recall
from loftq.checkpoint import Checkpoint, CheckpointWriter, backbone_hash
from loftq.formats import QuantizedTensor, parse_format
from loftq.methods import LayerSolution
from loftq.pipeline.calibration import Statistics
from loftq.pipeline.plan import ADAPTER_PREFIX, Batch, Plan, PlannedLayer, adapter_names
from loftq.pipeline.stream import effective, solved_batches, union_seconds

JOURNAL = ".loftq-journal.jsonl"
WRITERS = 4  # threads that copy to the host, hash and write
REST = "rest"  # the batch that holds every tensor copied as it is

OpenStatistics = Callable[[Recall], Statistics]
"""Gives the statistics of a run; asks what layers compute with that an earlier run has solved."""

OnBatch = Callable[[Batch, list[Mapping[str, Any]], bool], None]
"""Called after each batch with its records; the flag says that it was done in an earlier run."""


@dataclass(frozen=True, kw_only=True)
class RunResult:
    """What a finished run knows of its output."""

    plan: Plan
    records: tuple[Mapping[str, Any], ...]
    """One per layer, in model order."""
    hashes: Mapping[str, str]
    """sha256 of every tensor written."""
    backbone: str
    """sha256 over the packed tensors: the lineage that adapters refer to."""
    timings: Mapping[str, Any]
    """Seconds: total, solve (any batch being solved), batches (each, some at the same time). The
    only thing of a run that may differ between repeats."""
    refinement: tuple[Mapping[str, Any], ...] = ()
    """A row per stage of a refinement: its choices, and the losses of its units."""

    @property
    def formats(self) -> dict[str, str]:
        """Format of each layer as it is stored: of those that rivalled, the one that was kept."""
        return {record["name"]: record["format"] for record in self.records}


def run(
    plan: Plan,
    source: Checkpoint,
    output: Path,
    *,
    extra_files: Callable[[RunResult], Mapping[str, bytes]],
    on_batch: OnBatch | None = None,
    open_statistics: OpenStatistics | None = None,
) -> RunResult:
    """Quantize `source` into the folder `output`; continues an interrupted run of the same plan.

    Args:
        plan: from `make_plan`.
        source: the checkpoint that was planned.
        output: folder; made if missing.
        extra_files: the files that accompany the weights, config.json last.
        on_batch: progress.
        open_statistics: gives those of the inputs, for a plan with a calibration.

    Raises:
        ValueError: a weight holds NaN or infinity; the tensor is named. Once the source is repaired
            in place the run continues; other settings need another output folder.
        CheckpointError: output in use, full disk, or a resume with other settings.
    """
    start = time.perf_counter()
    spans: dict[str, tuple[float, float]] = {}
    with CheckpointWriter(
        output, plan.shards, output / JOURNAL, plan.fingerprint, describe=plan.describe()
    ) as writer:
        known = writer.records()
        for batch in plan.batches:
            if batch.name in known and on_batch:
                on_batch(batch, known[batch.name]["layers"], True)
        todo = [batch for batch in plan.batches if batch.name not in known]
        with ExitStack() as stack:
            statistics = None
            if open_statistics is not None:
                statistics = open_statistics(_recall(plan, writer))
                stack.callback(statistics.close)
            pool = stack.enter_context(ThreadPoolExecutor(1, thread_name_prefix="commit"))
            writers = stack.enter_context(ThreadPoolExecutor(WRITERS, thread_name_prefix="write"))
            pending: Future[float] | None = None
            if REST not in known:
                pending = pool.submit(_copy_rest, plan, source, writer)
            for done in solved_batches(plan, todo, source, statistics):
                spans[done.batch.name] = done.begin, done.end
                if pending is not None:
                    pending.result()
                pending = pool.submit(_write, done.batch, done.solution, writer, writers)
                if on_batch:
                    on_batch(done.batch, [r.to_dict() for r in done.solution.records], False)
            if pending is not None:
                pending.result()
        result = _result(plan, writer, spans, time.perf_counter() - start)
        writer.finish(extra_files(result))
    return result


def adapter_pair(layer: PlannedLayer, A: Tensor, B: Tensor) -> dict[str, Tensor]:
    """A (rank, in) and B (out, rank) under PEFT's names and in its orientation; {} without rank."""
    if not layer.rank:
        return {}
    name_a, name_b = adapter_names(layer.info)
    if layer.info.kind == "embedding":
        return {name_a: B.mT.contiguous(), name_b: A.mT.contiguous()}
    return {name_a: A, name_b: B}


def _write(
    batch: Batch, solution: LayerSolution, writer: CheckpointWriter, writers: ThreadPoolExecutor
) -> float:
    start = time.perf_counter()
    tensors: dict[str, Tensor] = {}
    for i, layer in enumerate(batch.layers):
        parts = solution.quantized[i].to_state_dict()
        tensors |= {f"{layer.stem}.{part}": tensor for part, tensor in parts.items()}
        tensors |= adapter_pair(layer, solution.lora_A[i], solution.lora_B[i])

    def write(name: str) -> None:
        writer.write(name, tensors[name].cpu().contiguous())

    list(writers.map(write, tensors))
    writer.commit(batch.name, {"layers": [record.to_dict() for record in solution.records]})
    return time.perf_counter() - start


def _recall(plan: Plan, writer: CheckpointWriter) -> Recall:
    """Reads back, on the plan's device, what layers compute with that are committed by now."""
    done, device = writer.records(), torch.device(plan.device)
    layers = {
        x.info.module: replace(x, spec=parse_format(record["format"]))
        for batch in plan.batches
        if batch.name in done
        for x, record in zip(batch.layers, done[batch.name]["layers"], strict=True)
    }

    def read(name: str) -> Tensor:
        return writer.read(name).to(device)

    def recall(module: str) -> Tensor | None:
        layer = layers.get(module)
        if layer is None:
            return None
        parts = {p.name.removeprefix(f"{layer.stem}."): read(p.name) for p in layer.packed()}
        quantized = QuantizedTensor.from_state_dict(layer.spec, layer.info.shape, parts)
        A, B = map(read, adapter_names(layer.info))
        return effective(layer.info, quantized, A, B, plan.config.scaling)

    return recall


def _copy_rest(plan: Plan, source: Checkpoint, writer: CheckpointWriter) -> float:
    start = time.perf_counter()
    for spec in plan.copied:
        writer.write_bytes(spec.name, source.read_bytes(spec.name))
    for spec in plan.heads:
        writer.write(ADAPTER_PREFIX + spec.name, source.read(spec.name).float())
    writer.commit(REST, {})
    return time.perf_counter() - start


def _result(
    plan: Plan, writer: CheckpointWriter, spans: Mapping[str, tuple[float, float]], total: float
) -> RunResult:
    records = writer.records()
    by_name = {
        record["name"]: record for batch in plan.batches for record in records[batch.name]["layers"]
    }
    hashes = writer.hashes()
    packed = {spec.name: hashes[spec.name] for layer in plan.layers for spec in layer.packed()}
    timings = {
        "total": total,
        "solve": union_seconds(list(spans.values())),
        "batches": {name: end - begin for name, (begin, end) in spans.items()},
    }
    return RunResult(
        plan=plan,
        records=tuple(by_name[layer.info.module] for layer in plan.layers),
        hashes=hashes,
        backbone=backbone_hash(packed),
        timings=timings,
    )
