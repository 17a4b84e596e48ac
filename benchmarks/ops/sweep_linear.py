"""Launch shapes of the few-token product, one against another: the data behind `choose_launch`.

    python benchmarks/ops/sweep_linear.py [--bits 4 3 2] [--tokens 1 16 64] [--shapes 4096x4096 ...]
        [--rank 64] [--kinds triton cuda] [--default] [--seconds 120]

Times as in bench_linear.py; `hot` is one weight over and over, from the L2 cache. A launch with a
wrong result is reported and not timed.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial

import torch
from bench_linear import Packed, copies, copy_bandwidth, graph_times, random_adapter, random_packed
from torch import Tensor

from loftq.ops import dequantize
from loftq.ops.cuda.few_tokens import MOST_TOKENS, few_tokens
from loftq.ops.cuda.plan import FewTokens, Launch, MoreTokens, Teams
from loftq.ops.few_tokens import Member
from loftq.ops.triton.linear import Launch as TritonLaunch
from loftq.ops.triton.linear import small_linear


def launches(tokens: int) -> Iterator[Launch]:
    """Launches of the CUDA product around its defaults."""
    if tokens > 8:
        most = 16 if tokens <= 16 else 32 if tokens <= 32 else 64
        for slabs, slab in ((3, 32), (2, 32), (2, 16), (1, 32)):
            yield MoreTokens(slabs=slabs, slab=slab, tokens=most)
        for slabs, slab, span in ((3, 32, 1), (6, 16, 1), (2, 16, 1), (2, 16, 2)):
            yield Teams(slabs=slabs, slab=slab, tokens=most, span=span)
    if tokens > 16:
        return
    most = 8 if tokens <= 8 else 16
    shapes = [
        (16, 32, 1, 1),
        (16, 16, 2, 1),
        (8, 32, 2, 1),
        (8, 32, 1, 2),
        (8, 16, 2, 2),
        (8, 16, 1, 2),
    ]
    for warps, slab, ahead, resident in shapes:
        yield FewTokens(warps=warps, slab=slab, ahead=ahead, tokens=most, resident=resident)


def triton_launches(tokens: int) -> Iterator[TritonLaunch]:
    """Launches of the Triton product around the ones it takes by itself."""
    shapes = {
        8: [(4, 32, 8, 4), (8, 16, 8, 4), (4, 16, 8, 4), (4, 32, 8, 2), (8, 32, 8, 2)],
        16: [(4, 32, 16, 2), (4, 16, 16, 4), (8, 32, 16, 1), (8, 16, 16, 2)],
        64: [(4, 32, 32, 1), (4, 32, 64, 1), (4, 64, 32, 1), (8, 64, 32, 1), (4, 64, 64, 1)],
    }
    for b, r, t, a in shapes[8 if tokens <= 8 else 16 if tokens <= 16 else 64]:
        yield TritonLaunch(batch=b, rows=r, tokens=t, ahead=a)


def error_ratio(y: Tensor, x: Tensor, exact: Tensor, adapter: tuple) -> float:
    """Error of y against float64 over that of the dense bf16 product, with the adapter if any."""
    wanted = x.double() @ exact.T
    dense = (x @ exact.to(x.dtype).T).double()
    if adapter:
        wanted = wanted + (x.double() @ adapter[0].double().T) @ adapter[1].double().T
        dense = dense + ((x @ adapter[0].T) @ adapter[1].T).double()
    return ((y.double() - wanted).norm() / (dense - wanted).norm()).item()


def routes(
    tokens: int, adapter: tuple, kinds: list[str], default: bool
) -> Iterator[tuple[str, Callable[[Tensor, Packed], Tensor]]]:
    def cuda(launch: Launch | None, overlap: bool, adapter: tuple, x: Tensor, w: Packed) -> Tensor:
        return few_tokens(
            x, (Member(*w.tensors, w.layout, *adapter),), launch=launch, overlap=overlap
        )

    def triton(
        launch: TritonLaunch | None, overlap: bool, adapter: tuple, x: Tensor, w: Packed
    ) -> Tensor:
        return small_linear(x, *w.tensors, *w.layout, *adapter, launch=launch, overlap=overlap)

    rank = len(adapter[0])
    if "triton" in kinds:
        yield "triton", partial(triton, None, False, ())
        yield "triton overlapping", partial(triton, None, True, ())
        yield f"triton r={rank}", partial(triton, None, False, adapter)
        yield f"triton overlapping r={rank}", partial(triton, None, True, adapter)
        for shape_of in () if default else triton_launches(tokens):
            name = f"triton b{shape_of.batch} r{shape_of.rows} t{shape_of.tokens}"
            yield f"{name} a{shape_of.ahead}", partial(triton, shape_of, False, ())
    if "cuda" not in kinds:
        return
    if tokens > MOST_TOKENS:
        return
    yield "cuda", partial(cuda, None, False, ())
    yield "cuda overlapping", partial(cuda, None, True, ())
    yield f"cuda r={rank}", partial(cuda, None, False, adapter)
    yield f"cuda overlapping r={rank}", partial(cuda, None, True, adapter)
    for launch in () if default else launches(tokens):
        name = " ".join(
            [launch.source, *(f"{key.lower()}={value}" for key, value in launch.definitions)]
        )
        yield f"cuda {name}", partial(cuda, launch, True, ())
        if isinstance(launch, FewTokens):
            early = replace(launch, early=True)
            yield f"cuda {name} r={rank}", partial(cuda, launch, True, adapter)
            yield f"cuda {name} early r={rank}", partial(cuda, early, True, adapter)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--shapes", nargs="+", default=["4096x4096", "11008x4096", "4096x11008"])
    parser.add_argument("--bits", nargs="+", type=int, default=[4, 3, 2])
    parser.add_argument("--tokens", nargs="+", type=int, default=[1, 16, 64])
    parser.add_argument("--kinds", nargs="+", choices=["triton", "cuda"], default=["triton"])
    parser.add_argument("--rank", type=int, default=64)
    parser.add_argument("--default", action="store_true", help="no other launch shapes")
    parser.add_argument("--seconds", type=float, default=120, help="start no row after this")
    args = parser.parse_args()
    started, peak = time.monotonic(), copy_bandwidth()
    generator = torch.Generator("cuda").manual_seed(0)
    print(f"copy {peak:.0f} GB/s")
    print("| shape | bits | tokens | route | us | hot | GB/s | share | error |")
    print("|---|--:|--:|---|--:|--:|--:|--:|--:|", flush=True)
    for name in args.shapes:
        shape = tuple(map(int, name.split("x")))
        for bits in args.bits:
            first = random_packed(shape, f"nf{bits}", generator)
            count = copies(first.nbytes)
            weights = [random_packed(shape, f"nf{bits}", generator) for _ in range(count)]
            exact = dequantize(*first.tensors, shape[1], *first.layout, torch.float32).double()
            for m in args.tokens:
                x = torch.randn(m, shape[1], device="cuda", dtype=torch.bfloat16)
                adapter = (*random_adapter(*shape, args.rank), 1.0)
                for route, run in routes(m, adapter, args.kinds, args.default):
                    if time.monotonic() - started > args.seconds:
                        print(f"stopped after {args.seconds:.0f} s")
                        return
                    try:
                        given = adapter if "r=" in route else ()
                        error = error_ratio(run(x, first), x, exact, given)
                        right = error < 2
                        times = [partial(run, x, w) for w in weights] if right else []
                        us = graph_times(times)[0] if right else float("nan")
                        hot = graph_times([partial(run, x, first)] * 40)[0] if right else us
                    except (RuntimeError, ValueError) as failure:
                        print(f"| {name} | {bits} | {m} | {route} | {str(failure)[:200]} |")
                        continue
                    rate = first.nbytes / us / 1e3
                    print(
                        f"| {name} | {bits} | {m} | {route} | {us:.2f} | {hot:.2f} | {rate:.0f} | "
                        f"{rate / peak:.0%} | {error:.2f} |",
                        flush=True,
                    )


if __name__ == "__main__":
    main()
