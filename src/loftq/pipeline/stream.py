"""Batches of weights in, their solutions out, in the plan's order.

On a GPU a few threads read and solve a batch each, on streams of their own: the copies and small
eigenproblems that one batch needs of the host run while another keeps the device busy. Each thread
computes alone: waking sixteen for a 128 x 128 eigenproblem takes four times as long as solving
it. On a CPU batches would share the same cores, so they go one by one. The solutions are the same
either way.
Anonymous memory is bounded by the batches in flight, never by the model: the source is mapped.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice

import torch
from torch import Tensor

from loftq.formats import QuantizedTensor
from loftq.methods import LayerProblem, LayerSolution, ProblemStatistics
from loftq.pipeline.calibration import Statistics, read_statistics
from loftq.pipeline.layout import LayerInfo
from loftq.pipeline.plan import Batch, Plan, Source
from loftq.pipeline.rounded import LARGEST, not_usable, round_layer


@dataclass(frozen=True)
class Solved:
    """A batch, what became of it, and when it was solved on the clock of time.perf_counter."""

    batch: Batch
    solution: LayerSolution
    begin: float
    end: float


def solved_batches(
    plan: Plan, batches: Sequence[Batch], source: Source, statistics: Statistics | None = None
) -> Iterator[Solved]:
    """Read and solve `batches`, in order; several of them at a time on a GPU.

    Args:
        plan: what is to be done.
        batches: the batches of it that are left.
        source: the weights.
        statistics: of the inputs, for a plan with a calibration.

    Raises:
        ValueError: a weight holds NaN or infinity; the tensor is named.
    """
    device = torch.device(plan.device)
    if device.type == "cpu":
        for batch in batches:
            yield _solved(plan, batch, source, device, statistics)
        return
    # torch loads its GPU linear algebra at the first call, and fails if threads race for it.
    torch.linalg.cholesky(torch.eye(1, device=device))
    waiting = iter(batches)
    ahead: deque[Future[Solved]] = deque()
    threads = torch.get_num_threads()
    with ThreadPoolExecutor(plan.solved_at_once, "solve", _settle, (device,)) as pool:
        try:
            # One more than are solved at a time, so that no thread waits for the consumer.
            for batch in islice(waiting, plan.solved_at_once + 1):
                ahead.append(pool.submit(_solved, plan, batch, source, device, statistics))
            while ahead:
                done = ahead.popleft().result()
                if (following := next(waiting, None)) is not None:
                    ahead.append(pool.submit(_solved, plan, following, source, device, statistics))
                yield done
        finally:
            pool.shutdown(cancel_futures=True)
            torch.set_num_threads(threads)  # threads that start later take the number set last


def union_seconds(spans: Sequence[tuple[float, float]]) -> float:
    """Seconds covered by (begin, end) intervals that may overlap."""
    covered, reached = 0.0, float("-inf")
    for begin, end in sorted(spans):
        covered += max(0.0, end - max(begin, reached))
        reached = max(reached, end)
    return covered


def oriented(weight: Tensor, info: LayerInfo) -> Tensor:
    """The stored tensor as (out_features, in_features); Conv1D keeps it transposed."""
    return weight.mT if info.kind == "conv1d" else weight


def solve_batch(
    plan: Plan, batch: Batch, weights: Tensor, known: ProblemStatistics | None = None
) -> LayerSolution:
    """The method's solution of one batch; weights (n, out_features, in_features) float32."""
    first = batch.layers[0]
    problem = LayerProblem(
        names=tuple(layer.info.module for layer in batch.layers),
        weights=weights,
        spec=first.spec,
        rank=first.rank,
        scaling=plan.config.scaling,
        scale_fit=first.scale_fit,
        seeds=tuple(layer.seed for layer in batch.layers),
        statistics=known,
        strict=plan.config.strict,
    )
    with torch.no_grad():
        return plan.config.resolved_method().solve(problem)


def _settle(device: torch.device) -> None:
    """Make this thread compute alone, on its own stream (freed memory is reused per stream)."""
    torch.set_num_threads(1)
    if device.type == "cuda":
        torch.cuda.set_stream(torch.cuda.Stream(device))


def _solved(
    plan: Plan,
    batch: Batch,
    source: Source,
    device: torch.device,
    statistics: Statistics | None,
) -> Solved:
    begin = time.perf_counter()
    if batch.layers[0].rank:
        weights = _load(batch, source, device)
        begin = time.perf_counter()
        solution = solve_batch(plan, batch, weights, _known(plan, batch, device, statistics))
        _settle_batch(plan, batch, solution, statistics)
    else:
        solution = round_layer(plan, batch.layers[0], source, device)
    if device.type == "cuda":
        # Whoever takes the solution does so from another stream.
        torch.cuda.current_stream(device).synchronize()
    return Solved(batch, solution, begin, time.perf_counter())


def _known(
    plan: Plan, batch: Batch, device: torch.device, statistics: Statistics | None
) -> ProblemStatistics | None:
    if plan.calibration is None:
        return None
    assert statistics is not None, "a plan with a calibration is run with its statistics"
    names = [layer.info.module for layer in batch.layers]
    return read_statistics(statistics, names, plan.calibration.kind, device)


def _settle_batch(
    plan: Plan, batch: Batch, solution: LayerSolution, statistics: Statistics | None
) -> None:
    """Let what follows read the outputs of these layers as they are from now on."""
    if plan.calibration is None or statistics is None:
        return
    for i, layer in enumerate(batch.layers):
        statistics.settle(
            layer.info.module,
            lambda i=i, layer=layer: effective(  # type: ignore[misc]
                layer.info,
                solution.quantized[i],
                solution.lora_A[i],
                solution.lora_B[i],
                plan.config.scaling,
            ),
        )


def effective(
    info: LayerInfo, quantized: QuantizedTensor, A: Tensor, B: Tensor, scaling: float
) -> Tensor:
    """Q + scaling B A float32 in the module's orientation; a resume forms it from the files."""
    return oriented(quantized.dequantize() + scaling * (B @ A), info)


def _load(batch: Batch, source: Source, device: torch.device) -> Tensor:
    stack = torch.empty(len(batch.layers), *batch.layers[0].info.shape, device=device)
    for place, layer in zip(stack, batch.layers, strict=True):
        place.copy_(oriented(source.read(layer.info.tensor).to(device), layer.info))
    if torch.linalg.vector_norm(stack, torch.inf) <= LARGEST:  # false of a NaN
        return stack
    for place, layer in zip(stack, batch.layers, strict=True):
        if bad := int((~(place.abs() <= LARGEST)).sum()):
            raise not_usable(layer, bad)
    raise AssertionError("a batch holds a value that none of its weights holds")
