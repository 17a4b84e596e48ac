"""Carry out a plan: stream batches of weights in, solve them, stream packed tensors out.

Reading the next batch, solving this one and writing the last one overlap on a GPU; on a CPU they
share the same cores, so only writing is in the background. Anonymous memory is bounded by the
batches in flight, never by the model: the source is memory-mapped.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from loftq.checkpoint import Checkpoint, CheckpointWriter, backbone_hash
from loftq.methods import LayerProblem, LayerSolution
from loftq.pipeline.layout import LayerInfo
from loftq.pipeline.plan import ADAPTER_PREFIX, Batch, Plan, Source, adapter_names

JOURNAL = ".loftq-journal.jsonl"
REST = "rest"  # the batch that holds every tensor copied as it is

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
    """Seconds by part; the only thing of a run that may differ between repeats."""


def run(
    plan: Plan,
    source: Checkpoint,
    output: Path,
    *,
    extra_files: Callable[[RunResult], Mapping[str, bytes]],
    on_batch: OnBatch | None = None,
) -> RunResult:
    """Quantize `source` into the folder `output`; continues an interrupted run of the same plan.

    Args:
        plan: from `make_plan`.
        source: the checkpoint that was planned.
        output: folder; made if missing.
        extra_files: the files that accompany the weights, config.json last.
        on_batch: progress.

    Raises:
        ValueError: a weight holds NaN or infinity; the tensor is named. Once the source is repaired
            in place the run continues; other settings need another output folder.
        CheckpointError: output in use, full disk, or a resume with other settings.
    """
    start = time.perf_counter()
    seconds: dict[str, float] = {}
    with CheckpointWriter(
        output, plan.shards, output / JOURNAL, plan.fingerprint, describe=plan.describe()
    ) as writer:
        known = writer.records()
        for batch in plan.batches:
            if batch.name in known and on_batch:
                on_batch(batch, known[batch.name]["layers"], True)
        todo = [batch for batch in plan.batches if batch.name not in known]
        with ThreadPoolExecutor(1, thread_name_prefix="write") as pool:
            pending: Future[float] | None = None
            if REST not in known:
                pending = pool.submit(_copy_rest, plan, source, writer)
            for batch, weights in loaded_batches(todo, source, torch.device(plan.device)):
                solution, spent = _solve(plan, batch, weights)
                seconds[batch.name] = spent
                if pending is not None:
                    pending.result()
                pending = pool.submit(_write, plan, batch, solution, writer)
                if on_batch:
                    on_batch(batch, [record.to_dict() for record in solution.records], False)
            if pending is not None:
                pending.result()
        result = _result(plan, writer, seconds, time.perf_counter() - start)
        writer.finish(extra_files(result))
    return result


def oriented(weight: Tensor, info: LayerInfo) -> Tensor:
    """The stored tensor as (out_features, in_features); Conv1D keeps it transposed."""
    return weight.mT if info.kind == "conv1d" else weight


def adapter_pair(info: LayerInfo, A: Tensor, B: Tensor) -> dict[str, Tensor]:
    """A (rank, in) and B (out, rank) under PEFT's names and in its orientation."""
    name_a, name_b = adapter_names(info)
    if info.kind == "embedding":
        return {name_a: B.mT.contiguous(), name_b: A.mT.contiguous()}
    return {name_a: A, name_b: B}


def solve_batch(plan: Plan, batch: Batch, weights: Tensor) -> LayerSolution:
    """The method's solution of one batch; weights (n, out_features, in_features) float32."""
    first = batch.layers[0]
    problem = LayerProblem(
        names=tuple(layer.info.module for layer in batch.layers),
        weights=weights,
        spec=first.spec,
        rank=plan.config.rank,
        scaling=plan.config.scaling,
        scale_fit=first.scale_fit,
        seeds=tuple(layer.seed for layer in batch.layers),
    )
    with torch.no_grad():
        return plan.config.resolved_method().solve(problem)


def _solve(plan: Plan, batch: Batch, weights: Tensor) -> tuple[LayerSolution, float]:
    """The solution and its seconds, with the device's queue run dry."""
    start = time.perf_counter()
    solution = solve_batch(plan, batch, weights)
    if weights.is_cuda:
        torch.cuda.synchronize(weights.device)
    return solution, time.perf_counter() - start


def loaded_batches(
    batches: Sequence[Batch], source: Source, device: torch.device
) -> Iterator[tuple[Batch, Tensor]]:
    """Each batch with its weights on the device, the next one being read meanwhile on a GPU."""
    if device.type == "cpu":
        for batch in batches:
            yield batch, _load(batch, source, device)
        return
    with ThreadPoolExecutor(1, thread_name_prefix="read") as pool:
        ahead = pool.submit(_load, batches[0], source, device) if batches else None
        for batch, following in zip(batches, [*batches[1:], None], strict=True):
            assert ahead is not None
            weights = ahead.result()
            ahead = pool.submit(_load, following, source, device) if following else None
            yield batch, weights


def _load(batch: Batch, source: Source, device: torch.device) -> Tensor:
    shape = batch.layers[0].info.shape
    stack = torch.empty(len(batch.layers), *shape, device=device)
    for place, layer in zip(stack, batch.layers, strict=True):
        place.copy_(oriented(source.read(layer.info.tensor).to(device), layer.info))
        if not torch.isfinite(place).all():
            bad = int((~torch.isfinite(place)).sum())
            raise ValueError(
                f"{layer.info.tensor}: {bad} of {place.numel()} values are NaN or infinite. Repair "
                f'the source, or keep the layer at 16 bits with skip=["{layer.info.module}"].'
            )
    return stack


def _write(plan: Plan, batch: Batch, solution: LayerSolution, writer: CheckpointWriter) -> float:
    start = time.perf_counter()
    for i, layer in enumerate(batch.layers):
        for part, tensor in solution.quantized[i].to_state_dict().items():
            writer.write(f"{layer.stem}.{part}", tensor.cpu().contiguous())
        pair = adapter_pair(layer.info, solution.lora_A[i], solution.lora_B[i])
        for name, tensor in pair.items():
            writer.write(name, tensor.cpu().contiguous())
    writer.commit(batch.name, {"layers": [record.to_dict() for record in solution.records]})
    return time.perf_counter() - start


def _copy_rest(plan: Plan, source: Checkpoint, writer: CheckpointWriter) -> float:
    start = time.perf_counter()
    for spec in plan.copied:
        writer.write_bytes(spec.name, source.read_bytes(spec.name))
    for spec in plan.heads:
        writer.write(ADAPTER_PREFIX + spec.name, source.read(spec.name).float())
    writer.commit(REST, {})
    return time.perf_counter() - start


def _result(
    plan: Plan, writer: CheckpointWriter, solve_seconds: dict[str, float], total: float
) -> RunResult:
    records = writer.records()
    by_name = {
        record["name"]: record for batch in plan.batches for record in records[batch.name]["layers"]
    }
    hashes = writer.hashes()
    packed = {spec.name: hashes[spec.name] for layer in plan.layers for spec in layer.packed()}
    timings = {"total": total, "solve": sum(solve_seconds.values()), "batches": solve_seconds}
    return RunResult(
        plan=plan,
        records=tuple(by_name[layer.info.module] for layer in plan.layers),
        hashes=hashes,
        backbone=backbone_hash(packed),
        timings=timings,
    )
