"""Launches that did not run on a GPU yet beside those that are taken: one command, 80 seconds.

    python benchmarks/ops/compare_launches.py [--seconds 78]

First a Llama-2-7B shape decodes (bench_decode.py) with each way of the few-token product, at 4, 3
and 2 bits, and says whether its logits are those of the first row, bit for bit. Then one layer at
1, 16, 32 and 64 tokens, in a graph of overlapping launches; a row with a wrong result is not timed.
What is faster, and right, becomes the default: LAUNCHES (ops/cuda/plan.py), MORE_CUDA_TOKENS, _BITS
and _ROWS (ops/dispatch.py), SOONER (ops/triton/overlap.py).
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial
from itertools import pairwise

import torch
from bench_decode import make_decoder, make_model
from bench_linear import copies, copy_bandwidth, graph_times, random_adapter, random_packed
from sweep_linear import error_ratio
from torch import Tensor

from loftq.ops import dequantize
from loftq.ops.cuda import few_tokens as product
from loftq.ops.cuda.plan import LAUNCHES, FewTokens, Launch, MoreTokens, Teams
from loftq.ops.few_tokens import Member
from loftq.ops.triton import linear, overlap

RANK, CONTEXT, STEPS = 64, 1024, 40
BIG, SQUARE, DEEP = (11008, 4096), (4096, 4096), (4096, 11008)
EARLY = tuple(replace(launch, early=True) if isinstance(launch, FewTokens) else launch
              for launch in LAUNCHES)  # fmt: skip
TAKEN = FewTokens(warps=16, slab=32, ahead=1)


@dataclass(frozen=True)
class Way:
    """Of decoding: launches of the product, and what is between them."""

    name: str
    launches: tuple[Launch, ...] = LAUNCHES
    kind: str = "overlapping"
    sooner: bool = False


WAYS = (
    Way("fused", kind="fused"),
    Way("overlapping"),
    Way("fused, s16 a3", (FewTokens(warps=16, slab=16, ahead=3), *LAUNCHES), kind="fused"),
    Way("overlapping, early", EARLY),
    Way("overlapping, early, sooner", EARLY, sooner=True),
    Way("the same, s32 a2", (FewTokens(warps=16, slab=32, ahead=2, early=True), *EARLY),
        sooner=True),
    Way("the same, s16 a3", (FewTokens(warps=16, slab=16, ahead=3, early=True), *EARLY),
        sooner=True),
)  # fmt: skip


@dataclass(frozen=True)
class Case:
    """Launches of one layer; `launch` None is Triton's product."""

    shape: tuple[int, int]
    bits: int
    tokens: int
    launch: Launch | None
    ranked: bool = False


def cases() -> Iterator[Case]:
    """In the order of what is most wanted."""
    early, most = replace(TAKEN, early=True), (16, 32, 64)
    for shape in (BIG, SQUARE):
        for launch, ranked in ((TAKEN, False), (TAKEN, True), (early, True)):
            yield Case(shape, 4, 1, launch, ranked)
        for tokens in (64, 16, 32):
            yield Case(shape, 4, tokens, None)
            for launch in many(shape, next(m for m in most if tokens <= m)):
                yield Case(shape, 4, tokens, launch)
    for bits, shape in ((3, BIG), (2, BIG), (3, SQUARE), (2, SQUARE), (4, DEEP), (3, DEEP)):
        yield Case(shape, bits, 1, TAKEN)
        yield Case(shape, bits, 1, early, True)


def many(shape: tuple[int, int], most: int) -> Iterator[Launch]:
    """Launches for up to `most` tokens."""
    if most == 16:
        for slab, ahead in ((32, 1), (16, 2)):
            yield FewTokens(warps=16, slab=slab, ahead=ahead, tokens=16)
    if shape[0] > 4096:
        yield MoreTokens(slabs=3, tokens=most)
        for slabs, slab in ((3, 32), (6, 16)):
            yield Teams(slabs=slabs, slab=slab, tokens=most)
    else:
        yield MoreTokens(slabs=2, slab=16, tokens=most)
        for span in (1, 2):
            yield Teams(slabs=2, slab=16, tokens=most, span=span)


def decode(name: str, ways: tuple[Way, ...], deadline: float) -> None:
    """A row for each way; of one that fails, why."""
    model, first = make_model(name, 32, RANK), None
    prompt = torch.randint(0, 32000, (1, CONTEXT), generator=torch.Generator().manual_seed(1))
    for way in ways:
        if time.monotonic() > deadline - 6:
            print(f"no time for {name}, {way.name}", flush=True)
            continue
        product.LAUNCHES, overlap.SOONER = way.launches, way.sooner
        try:
            logits, times = decode_steps(model, way.kind, prompt)
        except (RuntimeError, ValueError) as failure:
            print(f"| {name} | {way.name} | {str(failure)[:160]} |", flush=True)
            continue
        finally:
            product.LAUNCHES, overlap.SOONER = LAUNCHES, False
        first = logits if first is None else first
        quantiles = " | ".join(f"{times[STEPS * n // 10]:.3f}" for n in (5, 2, 8))
        print(f"| {name} | {way.name} | {quantiles} | {torch.equal(first, logits)} |", flush=True)


def decode_steps(model: object, kind: str, prompt: Tensor) -> tuple[Tensor, list[float]]:
    """(logits of the first 6 tokens, milliseconds of the STEPS after them, ascending)."""
    decoder = make_decoder(model, 1, CONTEXT + STEPS + 16, kind)
    token, logits = decoder.prefill(prompt).argmax(-1), []
    for _ in range(6):
        logits.append(decoder.step(token).clone())
        token = logits[-1].argmax(-1)
    events = [torch.cuda.Event(enable_timing=True) for _ in range(STEPS + 1)]
    events[0].record()
    for event in events[1:]:
        token = decoder.step(token).argmax(-1)
        event.record()
    torch.cuda.synchronize()
    return torch.cat(logits), sorted(a.elapsed_time(b) for a, b in pairwise(events))


def run_case(case: Case, generator: torch.Generator) -> str:
    """Microseconds, GB/s and error, or why not."""
    make = partial(random_packed, case.shape, f"nf{case.bits}", generator)
    first = make()
    x = torch.randn(case.tokens, case.shape[1], device="cuda", dtype=torch.bfloat16)
    adapter = random_adapter(*case.shape, RANK) if case.ranked else ()

    def run(w) -> Tensor:
        members = (Member(*w.tensors, w.layout, *adapter),)
        if case.launch is None:
            return linear.small_linears(x, members, overlap=True)
        return product.few_tokens(x, members, launch=case.launch, overlap=True)

    try:
        exact = dequantize(*first.tensors, case.shape[1], *first.layout, torch.float32).double()
        error = error_ratio(run(first), x, exact, (*adapter, 1.0) if adapter else ())
        if not error < 2:
            return f"wrong: error {error:.3g}"
        weights = [make() for _ in range(copies(first.nbytes))]
        times = graph_times([partial(run, w) for w in weights])
    except (RuntimeError, ValueError) as failure:
        return str(failure)[:160]
    rate = first.nbytes / times[0] / 1e3
    return " | ".join([*(f"{t:.2f}" for t in times), f"{rate:.0f}", f"{error:.2f}"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--seconds", type=float, default=78, help="start no row after this")
    deadline = time.monotonic() + parser.parse_args().seconds
    print(torch.cuda.get_device_name(), torch.__version__, f"copy {copy_bandwidth():.0f} GB/s")
    print("| weights | way | ms a token | p20 | p80 | logits of the first row |")
    print("|---|---|--:|--:|--:|---|", flush=True)
    decode("nf4", WAYS, deadline)
    for name in ("nf3", "nf2"):
        decode(name, (WAYS[1], *WAYS[3:5]), deadline)
    print("| shape | bits | tokens | launch | us | p20 | p80 | GB/s | error |")
    print("|---|--:|--:|---|--:|--:|--:|--:|--:|", flush=True)
    generator = torch.Generator("cuda").manual_seed(0)
    for case in cases():
        if time.monotonic() > deadline - 2:
            print("stopped: no time is left")
            return
        ranked = f" r={RANK}" if case.ranked else ""
        shape = "x".join(map(str, case.shape))
        launch = "Triton" if case.launch is None else str(case.launch)
        row = run_case(case, generator)
        print(f"| {shape} | {case.bits} | {case.tokens} | {launch}{ranked} | {row} |", flush=True)


if __name__ == "__main__":
    main()
