"""Batches of weights in, their solutions out, in the plan's order.

On a GPU a few threads read and solve a batch each, on streams of their own: the copies and small
eigenproblems that one batch needs of the host run while another keeps the device busy. Where one
is solved at a time, as with Grams, the next is read meanwhile, unless its statistics are those of
the model with all before it quantized. Each thread computes alone: waking
sixteen for a 128 x 128 eigenproblem takes four times as long as solving it. On a CPU batches would
share the same cores, so they go one by one. The solutions are the same either way.
Anonymous memory is bounded by the batches in flight, never by the model: the source is mapped.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from itertools import islice

import torch
from torch import Tensor

from loftq.formats import QuantizedTensor
from loftq.methods import LayerProblem, LayerSolution, ProblemStatistics
from loftq.ops.precision import full_float32
from loftq.pipeline.calibration import Statistics, read_statistics
from loftq.pipeline.layout import LayerInfo
from loftq.pipeline.plan import Batch, Plan, Source
from loftq.pipeline.rounded import LARGEST, not_usable, round_layer

Inputs = Callable[[], tuple[Tensor, ProblemStatistics | None]]
"""Reads the weights of a batch and what is known of their inputs."""


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
    with full_float32():  # here, since it is a setting that all threads share
        yield from _solved_batches(plan, batches, source, statistics)


def _solved_batches(
    plan: Plan, batches: Sequence[Batch], source: Source, statistics: Statistics | None
) -> Iterator[Solved]:
    device = torch.device(plan.device)

    def read(batch: Batch) -> Inputs:
        return partial(_read, plan, batch, source, device, statistics)

    if device.type == "cpu":
        for batch in batches:
            yield _solved(plan, batch, source, device, read(batch), statistics)
        return
    # torch loads its GPU linear algebra at the first call, and fails if threads race for it.
    torch.linalg.cholesky(torch.eye(1, device=device))
    waiting = iter(batches)
    ahead: deque[Future[Solved]] = deque()
    threads = torch.get_num_threads()
    sequential = plan.config.resolved_method().sequential
    assert not sequential or plan.solved_at_once == 1, "a sequence is solved one after the other"
    with (
        ThreadPoolExecutor(plan.solved_at_once, "solve", _settle, (device,)) as pool,
        ThreadPoolExecutor(1, "read", _settle, (device,)) as reader,
    ):

        def begin(batch: Batch) -> Future[Solved]:
            inputs = read(batch)
            if plan.solved_at_once == 1 and not sequential:  # several read and solve in turn
                inputs = reader.submit(inputs).result
            return pool.submit(_solved, plan, batch, source, device, inputs, statistics)

        try:
            # One more than are solved at a time, so that no thread waits for the consumer.
            ahead.extend(map(begin, islice(waiting, plan.solved_at_once + 1)))
            while ahead:
                done = ahead.popleft().result()
                if (following := next(waiting, None)) is not None:
                    ahead.append(begin(following))
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
        rival=first.rival,
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
    read: Inputs,
    statistics: Statistics | None,
) -> Solved:
    begin = time.perf_counter()
    if batch.layers[0].rank:
        weights, known = read()
        begin = time.perf_counter()
        solution = solve_batch(plan, batch, weights, known)
        _settle_batch(plan, batch, solution, statistics)
    else:
        solution = round_layer(plan, batch.layers[0], source, device)
    _wait(device)  # whoever takes the solution does so from another stream
    return Solved(batch, solution, begin, time.perf_counter())


def _read(
    plan: Plan, batch: Batch, source: Source, device: torch.device, statistics: Statistics | None
) -> tuple[Tensor, ProblemStatistics | None]:
    """Weights and statistics of a batch, on the device; of none that is only rounded."""
    if not batch.layers[0].rank:
        return torch.empty(0), None
    weights, known = _load(batch, source, device), None
    if plan.calibration is not None:
        assert statistics is not None, "a plan with a calibration is run with its statistics"
        names = [layer.info.module for layer in batch.layers]
        known = read_statistics(statistics, names, plan.calibration.kind, device)
    _wait(device)  # another thread may solve it, on a stream of its own
    return weights, known


def _wait(device: torch.device) -> None:
    """Until all that this thread has started on the device is done."""
    if device.type == "cuda":
        torch.cuda.current_stream(device).synchronize()


def _settle_batch(
    plan: Plan, batch: Batch, solution: LayerSolution, statistics: Statistics | None
) -> None:
    """Let what follows read the outputs of these layers as they are from now on."""
    if plan.calibration is None or statistics is None:
        return
    for i, layer in enumerate(batch.layers):
        parts = solution.quantized[i], solution.lora_A[i], solution.lora_B[i]
        weight = partial(effective, layer.info, *parts, plan.config.scaling)
        statistics.settle(layer.info.module, weight)


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
