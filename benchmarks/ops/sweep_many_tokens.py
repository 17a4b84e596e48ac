"""Routes of a packed product of many tokens, one against another, on one GPU.

    python benchmarks/ops/sweep_many_tokens.py [--bits 4] [--tokens 256 512 1024 2048 4096 128]
        [--shapes 11008x4096 4096x4096] [--seconds 100]

- `cuBLAS`: a dense bf16 weight with the values of the packed ones.
- `dequantize`: the whole weight, then cuBLAS.
- `fused`: the packed bytes (ops/triton/many_tokens.py), by launch.
- `panels R`: R rows at a time are dequantized into a buffer that stays in the L2 cache, and
  multiplied; `beside`: the next panel on a second stream while one is multiplied.

Times as in bench_linear.py. A wrong result or a failing route is reported and not timed.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import lru_cache, partial
from itertools import product

import torch
from bench_linear import (
    Packed,
    _header,
    copies,
    copy_bandwidth,
    dequantize_and_multiply,
    graph_times,
    random_packed,
)
from sweep_linear import error_ratio
from torch import Tensor

from loftq.ops import dequantize
from loftq.ops.triton.dequantize import dequantize as dequantize_rows
from loftq.ops.triton.many_tokens import Launch, many_tokens_linear

Route = Callable[[Tensor, Packed], Tensor]

LAUNCHES = (
    Launch(multiply=True), Launch(), Launch(stages=3, multiply=True),
    Launch(warps=4, stages=3, multiply=True), Launch(tokens=128, multiply=True),
    Launch(warps=4, tokens=128, multiply=True), Launch(warps=16, tokens=128, multiply=True),
    Launch(tokens=128),
)  # fmt: skip


@lru_cache
def buffers(rows: int, columns: int) -> tuple[Tensor, Tensor]:
    """Two panels, made outside any graph."""
    pair = torch.empty((2, rows, columns), dtype=torch.bfloat16, device="cuda")
    return pair[0], pair[1]


@lru_cache
def side_stream() -> torch.cuda.Stream:
    return torch.cuda.Stream()


def fill(packed: Packed, columns: int, start: int, buffer: Tensor) -> Tensor:
    """The rows from `start` on, as many as there are, in the buffer."""
    assert packed.tensors[0] is not None
    out = buffer[: min(len(buffer), packed.tensors[0].shape[0] - start)]
    layout = (columns, *packed.layout, torch.bfloat16)
    return dequantize_rows(*packed.tensors, *layout, start=start, out=out)


def panels(rows: int, x: Tensor, packed: Packed) -> Tensor:
    buffer = buffers(rows, x.shape[1])[0]
    y = x.new_empty((len(x), packed.tensors[0].shape[0]))
    for start in range(0, y.shape[1], rows):
        weight = fill(packed, x.shape[1], start, buffer)
        torch.mm(x, weight.T, out=y[:, start : start + len(weight)])
    return y


def panels_beside(rows: int, x: Tensor, packed: Packed) -> Tensor:
    main, side, pair = torch.cuda.current_stream(), side_stream(), buffers(rows, x.shape[1])
    y = x.new_empty((len(x), packed.tensors[0].shape[0]))
    side.wait_stream(main)
    used: list[torch.cuda.Event] = []
    for i, start in enumerate(range(0, y.shape[1], rows)):
        with torch.cuda.stream(side):
            if i >= 2:
                side.wait_event(used[i - 2])
            weight = fill(packed, x.shape[1], start, pair[i % 2])
            ready = side.record_event()
        main.wait_event(ready)
        torch.mm(x, weight.T, out=y[:, start : start + len(weight)])
        used.append(main.record_event())
    return y


def fused(launch: Launch, x: Tensor, packed: Packed) -> Tensor:
    return many_tokens_linear(x, *packed.tensors, *packed.layout, launch=launch)


def routes(tokens: int, rows: int, launches: int) -> Iterator[tuple[str, Route]]:
    yield "dequantize", dequantize_and_multiply
    for launch in LAUNCHES[:launches] if tokens <= 2048 else LAUNCHES[:2]:
        name = f"fused w{launch.warps} t{launch.tokens} s{launch.stages}"
        yield name + (" 16-bit scales" if launch.multiply else ""), partial(fused, launch)
    sizes = [r for r in (1024, 2048, 2816, 4096) if r < rows] if tokens >= 512 else []
    for size in sizes:
        yield f"panels {size}", partial(panels, size)
        yield f"panels {size} beside", partial(panels_beside, size)


@dataclass(frozen=True)
class Case:
    """Weights of one shape, beyond the cache: packed, dense with the same values, one exactly."""

    name: str
    bits: int
    packed: list[Packed]
    dense: list[Tensor]
    exact: Tensor

    @property
    def label(self) -> str:
        return f"{self.name} | {self.bits}"


def make_case(name: str, bits: int) -> Case:
    rows, columns = map(int, name.split("x"))
    generator = torch.Generator("cuda").manual_seed(0)
    make = partial(random_packed, (rows, columns), f"nf{bits}", generator)
    packed = [make()]
    packed += [make() for _ in range(copies(packed[0].nbytes))]

    def dense(w: Packed, dtype: torch.dtype) -> Tensor:
        return dequantize(*w.tensors, columns, *w.layout, dtype)

    whole = [dense(w, torch.bfloat16) for w in packed[: copies(2 * rows * columns)]]
    return Case(name, bits, packed, whole, dense(packed[0], torch.float32).double())


def time_alone(case: Case) -> None:
    """A row of the dequantization without a product."""
    columns = case.exact.shape[1]
    calls = [
        partial(dequantize, *w.tensors, columns, *w.layout, torch.bfloat16) for w in case.packed
    ]
    print(f"| {case.label} | | dequantize alone | {graph_times(calls)[0]:.1f} | | | | | |")


def time_routes(case: Case, tokens: int, launches: int, deadline: float) -> bool:
    """Rows of every route for so many tokens; False if the time is over."""
    rows, columns = case.exact.shape
    x = torch.randn(tokens, columns, device="cuda", dtype=torch.bfloat16)
    base = graph_times([partial(torch.nn.functional.linear, x, w) for w in case.dense])
    label, operations = f"{case.label} | {tokens}", 2 * tokens * rows * columns
    print(f"| {label} | cuBLAS | {_figures(base, base[0], operations, 1.0)} |", flush=True)
    for route, run in routes(tokens, rows, launches):
        if time.monotonic() > deadline:
            return False
        try:
            error = error_ratio(run(x, case.packed[0]), x, case.exact, ())
            if error < 2:
                times = graph_times([partial(run, x, w) for w in case.packed])
                told = _figures(times, base[0], operations, error)
            else:
                told = f"wrong: {error:.3g}"
        except Exception as failure:  # a compiler, a capture: the others are still run
            lines = str(failure).strip().splitlines() or [type(failure).__name__]
            told = lines[0][:160]
        print(f"| {label} | {route} | {told} |", flush=True)
    return True


def _figures(times: tuple[float, float, float], base: float, operations: int, error: float) -> str:
    rate = operations / times[0] / 1e6
    quantiles = " | ".join(f"{t:.1f}" for t in times)
    return f"{quantiles} | {rate:.0f} | {times[0] / base:.2f} | {error:.2f}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--shapes", nargs="+", default=["11008x4096", "4096x4096"])
    parser.add_argument("--bits", nargs="+", type=int, default=[4])
    parser.add_argument("--tokens", nargs="+", type=int, default=[256, 512, 1024, 4096, 2048, 128])
    parser.add_argument("--launches", type=int, default=len(LAUNCHES), help="the first so many")
    parser.add_argument("--seconds", type=float, default=100, help="start no row after this")
    args = parser.parse_args()
    deadline = time.monotonic() + args.seconds
    print(_header(copy_bandwidth()))
    print("| shape | bits | tokens | route | us | p20 | p80 | TFLOP/s | in times of bf16 | error |")
    print("|---|--:|--:|---|--:|--:|--:|--:|--:|--:|", flush=True)
    for name, bits in product(args.shapes, args.bits):
        case = make_case(name, bits)
        time_alone(case)
        for tokens in args.tokens:
            if not time_routes(case, tokens, args.launches, deadline):
                print(f"stopped after {args.seconds:.0f} s")
                return


if __name__ == "__main__":
    main()
