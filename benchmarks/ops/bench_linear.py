"""One packed linear layer against bf16 cuBLAS and, where installed, its peers, on one GPU.

    python benchmarks/ops/bench_linear.py [--bits 4 3 2] [--tokens 1 4 16 64]
        [--shapes 4096x4096 ...] [--routes kernel triton overlap dequantize alone] [--peers]
        [--rank 64] [--seconds 600]

`kernel` is the product that the dispatcher takes (the table names its language), `triton` Triton's
wherever that is not the same; the peers come after all of our own rows.

Times are of one call inside a CUDA graph, over so many distinct weights that they cannot stay in
the L2 cache (>= 400 MB); median, p20 and p80 of 20 replays. `share` is stored bytes of the weight
over the time, relative to a copy measured in the same run. A result whose error against float64 is
more than twice that of the dense bf16 product is not timed: the run stops.
"""

from __future__ import annotations

import argparse
import subprocess
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import lru_cache, partial

import torch
from peers import PEERS
from torch import Tensor

from loftq.formats import component_shapes, parse_format
from loftq.ops import dequantize
from loftq.ops.dispatch import why_no_cuda_product, why_no_small_linear
from loftq.ops.few_tokens import Member, small_linears
from loftq.ops.triton import linear as triton_linear

ROTATED_BYTES = 400e6
REPLAYS = 20


@dataclass(frozen=True)
class Packed:
    """A random packed weight: arguments of the operators after x."""

    tensors: tuple[Tensor | None, ...]
    layout: tuple

    @property
    def nbytes(self) -> int:
        return sum(tensor.numel() for tensor in self.tensors if tensor is not None)


def random_packed(shape: tuple[int, int], name: str, generator: torch.Generator) -> Packed:
    """Uniform codes; nested scales between 0.005 and 0.015 around an offset of 0.02."""
    spec = parse_format(name)
    tensors: dict[str, Tensor] = {
        part: torch.randint(0, 256, size, dtype=torch.uint8, device="cuda", generator=generator)
        for part, size in component_shapes(spec, shape).items()
    }
    constants = torch.rand(tensors["weight_nested"].numel() // 4, device="cuda") * 0.01 + 0.005
    constants[0] = 0.02
    tensors["weight_nested"] = constants.view(torch.uint8)
    parts = ("weight_packed", "weight_scale", "weight_zero", "weight_nested")
    layout = (spec.bits, spec.group_size, spec.scale_coding, spec.levels, spec.default_zero)
    return Packed(tuple(tensors.get(part) for part in parts), layout)


def graph_times(calls: list[Callable[[], object]]) -> tuple[float, float, float]:
    """(median, p20, p80) microseconds per call of a graph that holds them all."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for call in calls[:2]:
            call()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    for _ in range(3):
        graph.replay()
    times = []
    for _ in range(REPLAYS):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) * 1e3 / len(calls))
    times.sort()
    return times[len(times) // 2], times[len(times) // 5], times[-len(times) // 5]


def copies(nbytes: float) -> int:
    """Weights that together exceed the cache."""
    return int(ROTATED_BYTES // nbytes) + 1


def copy_bandwidth() -> float:
    """GB/s of a device copy, bytes read plus bytes written."""
    source = torch.randn(2**29, device="cuda").bfloat16()
    target = torch.empty_like(source)
    microseconds = graph_times([lambda: target.copy_(source)])[0]
    return 4 * source.numel() / microseconds / 1e3


def check(
    y: Tensor, x: Tensor, weight: Tensor, label: str, adapter: tuple[Tensor, ...] = ()
) -> None:
    """Stop if y is not x @ weight^T (float64) to twice the error of the dense product."""
    exact = x.double() @ weight.T
    dense = (x @ weight.to(x.dtype).T).double()
    if adapter:
        A, B = adapter
        exact = exact + (x.double() @ A.double().T) @ B.double().T
        dense = dense + ((x @ A.T) @ B.T).double()
    error, allowed = (y.double() - exact).norm(), 2 * (dense - exact).norm()
    if not error <= allowed:
        raise SystemExit(f"{label}: error {error:.3g} above {allowed:.3g}; nothing is timed.")


def dequantize_and_multiply(x: Tensor, packed: Packed) -> Tensor:
    """The route of many tokens and of training."""
    weight = dequantize(*packed.tensors, x.shape[1], *packed.layout, x.dtype)
    return torch.nn.functional.linear(x, weight)


def member(packed: Packed, rank: int, x: Tensor) -> Member:
    """The weight, with a random adapter unless the rank is 0."""
    given = Member(*packed.tensors, packed.layout)  # type: ignore[arg-type]
    if not rank:
        return given
    A, B = random_adapter(given.packed.shape[0], x.shape[1], rank)
    return given._replace(lora_A=A, lora_B=B)


def kernel(rank: int, overlap: bool, x: Tensor, packed: Packed) -> Tensor:
    """The few-token product that the dispatcher takes."""
    return small_linears(x, (member(packed, rank, x),), overlap=overlap)


def triton(rank: int, x: Tensor, packed: Packed) -> Tensor:
    """Triton's few-token product."""
    return triton_linear.small_linears(x, (member(packed, rank, x),))


@lru_cache
def random_adapter(rows: int, columns: int, rank: int) -> tuple[Tensor, Tensor]:
    """Made at the first call, outside any graph."""
    return _small(rank, columns), _small(rows, rank)


def _small(*shape: int) -> Tensor:
    return 0.02 * torch.randn(shape, device="cuda").bfloat16()


def bf16_rows(shape: tuple[int, int], tokens: list[int]) -> Iterator[tuple[int, tuple]]:
    count = copies(2 * shape[0] * shape[1])
    weights = [torch.randn(shape, device="cuda", dtype=torch.bfloat16) for _ in range(count)]
    for m in tokens:
        x = torch.randn(m, shape[1], device="cuda", dtype=torch.bfloat16)
        yield m, graph_times([partial(torch.nn.functional.linear, x, w) for w in weights])


def few_token_routes(
    x: Tensor, first: Packed, routes: list[str], rank: int
) -> dict[str, Callable[[Tensor, Packed], Tensor]]:
    """The asked routes of few tokens, with an adapter too if there is a rank."""
    chosen: dict[str, Callable[[Tensor, Packed], Tensor]] = {}
    for r in (0, rank) if rank else (0,):
        folded = f" + r={r}" if r else ""
        language = "Triton" if why_no_cuda_product(x, (member(first, r, x),)) else "CUDA C++"
        if "kernel" in routes:
            chosen[f"{language}{folded}"] = partial(kernel, r, False)
        if "overlap" in routes:
            chosen[f"{language}{folded}, overlapping"] = partial(kernel, r, True)
        if "triton" in routes:
            chosen[f"Triton{folded}"] = partial(triton, r)
    return chosen


def packed_rows(
    shape: tuple[int, int], bits: int, tokens: list[int], routes: list[str], rank: int
) -> Iterator[tuple[str, int, tuple, int]]:
    generator = torch.Generator("cuda").manual_seed(0)
    first = random_packed(shape, f"nf{bits}", generator)
    weights = [random_packed(shape, f"nf{bits}", generator) for _ in range(copies(first.nbytes))]
    exact = dequantize(*first.tensors, shape[1], *first.layout, torch.float32).double()
    for m in tokens:
        x = torch.randn(m, shape[1], device="cuda", dtype=torch.bfloat16)
        chosen: dict[str, Callable[[Tensor, Packed], Tensor]] = {}
        if m <= 64 and {"kernel", "triton"} & set(routes):
            why = why_no_small_linear(x[:1], first.tensors[0], bits, 64)  # type: ignore[arg-type]
            if why:
                raise SystemExit(f"the kernel does not run here: {why}.")
            chosen |= few_token_routes(x, first, routes, rank)
        if "dequantize" in routes:
            chosen["dequantize"] = dequantize_and_multiply
        for route, run in chosen.items():
            low = random_adapter(*shape, rank) if "r=" in route else ()
            check(run(x, first), x, exact, f"{shape}, {bits} bits, {m} tokens, {route}", low)
            yield route, m, graph_times([partial(run, x, w) for w in weights]), first.nbytes
    if "alone" in routes:
        calls = [
            partial(dequantize, *w.tensors, shape[1], *w.layout, torch.bfloat16) for w in weights
        ]
        yield "dequantize alone", 0, graph_times(calls), first.nbytes + 2 * shape[0] * shape[1]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--shapes", nargs="+", default=["4096x4096", "11008x4096", "4096x11008"])
    parser.add_argument("--bits", nargs="+", type=int, default=[4, 3, 2])
    parser.add_argument("--tokens", nargs="+", type=int, default=[1, 4, 16, 64])
    parser.add_argument("--routes", nargs="+", default=["kernel", "triton", "dequantize"])
    parser.add_argument("--peers", action="store_true", help="bitsandbytes and gemlite too")
    parser.add_argument("--rank", type=int, default=0, help="also with an adapter of this rank")
    parser.add_argument("--seconds", type=float, default=600, help="start no row after this")
    args = parser.parse_args()
    started, peak = time.monotonic(), copy_bandwidth()
    print(_header(peak))
    print("| shape | weight | tokens | route | us | p20 | p80 | GB/s | share | x bf16 |")
    print("|---|---|--:|---|--:|--:|--:|--:|--:|--:|", flush=True)

    def row(shape: str, weight: str, m: int, route: str, times: tuple, nbytes: float, base: float):
        rate = nbytes / times[0] / 1e3
        print(
            f"| {shape} | {weight} | {m} | {route} | {times[0]:.1f} | {times[1]:.1f} | "
            f"{times[2]:.1f} | {rate:.0f} | {rate / peak:.0%} | {base / times[0]:.2f} |",
            flush=True,
        )

    bases: dict[str, dict[int, float]] = {}
    for name in args.shapes:
        shape = tuple(map(int, name.split("x")))
        size = shape[0] * shape[1]
        base = {}
        for m, times in bf16_rows(shape, args.tokens):
            base[m] = times[0]
            row(name, "bf16", m, "cuBLAS", times, 2 * size, times[0])
        base[0] = 0.0  # dequantizing alone has no product to stand beside
        bases[name] = base
        for bits in args.bits:
            for route, m, times, nbytes in packed_rows(
                shape, bits, args.tokens, args.routes, args.rank
            ):
                row(name, f"nf{bits} dq", m, route, times, nbytes, base[m])
                if time.monotonic() - started > args.seconds:
                    print(f"stopped after {args.seconds:.0f} s")
                    return
    for name in args.shapes if args.peers else ():
        for peer in PEERS:
            shape, few = tuple(map(int, name.split("x"))), [m for m in args.tokens if m <= 64]
            for weight, m, times, nbytes in peer(shape, few, copies, graph_times):
                row(name, weight, m, peer.__name__, times, nbytes, bases[name][m])
                if time.monotonic() - started > args.seconds:
                    print(f"stopped after {args.seconds:.0f} s")
                    return


def _header(peak: float) -> str:
    command = ["nvidia-smi", "--query-gpu=name,power.limit,driver_version", "--format=csv,noheader"]
    card = subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()
    import triton

    versions = f"torch {torch.__version__}, triton {triton.__version__}"
    return f"{card}, {versions}; copy {peak:.0f} GB/s\n"


if __name__ == "__main__":
    main()
