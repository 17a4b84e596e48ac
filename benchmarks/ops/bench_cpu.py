"""One packed linear layer on this CPU against torch's dense bfloat16 product.

    python benchmarks/ops/bench_cpu.py [--formats nf4 nf3 nf2] [--tokens 1 4 16 64]
        [--shape 11008x4096] [--threads 2] [--repeats 200]

Weights are rotated beyond the last-level cache. Wall times: least and median of the repeats; on a
machine that others use the least is the figure. `cpu` is the mean time of this process, all its
threads together, those that wait awake included. `dequantize + BLAS` is what a layer runs without
the few-token product, with the library's dequantization. A result whose error against float64 is
more than twice that of the dense product is not timed: the run stops.
"""

from __future__ import annotations

import argparse
import os
import platform
import time
from collections.abc import Callable
from itertools import cycle
from pathlib import Path

import torch
from torch import Tensor

from loftq.formats import component_shapes, parse_format
from loftq.ops.cpu.library import current_isa, find_library, why_no_library
from loftq.ops.cpu.linear import dequantize, small_linear

ROTATED_BYTES = 128e6
PARTS = ("weight_packed", "weight_scale", "weight_zero", "weight_nested")


def random_packed(shape: tuple[int, int], name: str, generator: torch.Generator) -> tuple:
    """(packed tensors, layout): uniform codes, nested scales between 0.005 and 0.015 off 0.02."""
    spec = parse_format(name)
    tensors = {
        part: torch.randint(0, 256, size, dtype=torch.uint8, generator=generator)
        for part, size in component_shapes(spec, shape).items()
    }
    if "weight_nested" not in tensors:
        raise SystemExit(f"{name}: random bytes make sense as nested scales only; use -dq.")
    constants = torch.rand(tensors["weight_nested"].numel() // 4, generator=generator)
    constants = constants * 0.01 + 0.005
    constants[0] = 0.02
    tensors["weight_nested"] = constants.view(torch.uint8)
    layout = (spec.bits, spec.group_size, spec.scale_coding, spec.levels, spec.default_zero)
    return tuple(tensors.get(part) for part in PARTS), layout


def timed(call: Callable[[], object], repeats: int) -> tuple[float, float, float]:
    """(least, median) wall and mean CPU milliseconds of a call."""
    wall = []
    call()
    # Over all repeats: the clock of a process hears of its other threads a tick late.
    used = time.process_time()
    for _ in range(repeats):
        begun = time.perf_counter()
        call()
        wall.append((time.perf_counter() - begun) * 1e3)
    used = time.process_time() - used
    return min(wall), sorted(wall)[repeats // 2], used * 1e3 / repeats


def check(y: Tensor, x: Tensor, weight: Tensor, label: str) -> None:
    """Stop if y is not x @ weight^T (float64) to twice the error of the dense product."""
    exact = x.double() @ weight.double().T
    dense = (x @ weight.to(x.dtype).T).double()
    error, allowed = (y.double() - exact).norm(), 2 * (dense - exact).norm()
    if not error <= allowed:
        raise SystemExit(f"{label}: error {error:.3g} above {allowed:.3g}; nothing is timed.")


def show(label: str, tokens: int, times: tuple[float, float, float], nbytes: int) -> None:
    least, median, cpu = times
    rate = nbytes / least / 1e6
    print(
        f"| {label} | {tokens} | {least:.2f} | {median:.2f} | {cpu:.2f} | {rate:.1f} |", flush=True
    )


def bench(name: str, shape: tuple[int, int], args: argparse.Namespace) -> None:
    """The rows of one format."""
    generator = torch.Generator().manual_seed(0)
    nbytes = sum(t.numel() for t in random_packed(shape, name, generator)[0] if t is not None)
    count = int(ROTATED_BYTES // nbytes) + 1
    weights = cycle([random_packed(shape, name, generator) for _ in range(count)])
    stored, layout = next(weights)
    W = dequantize(*stored, shape[1], *layout, torch.float32)
    for tokens in args.tokens:
        x = torch.randn(tokens, shape[1], generator=generator).bfloat16()
        check(small_linear(x, *stored, *layout), x, W, f"{name}, {tokens} tokens")

        def few(x: Tensor = x) -> None:
            stored, layout = next(weights)
            small_linear(x, *stored, *layout)

        def many(x: Tensor = x) -> None:
            stored, layout = next(weights)
            dense = dequantize(*stored, x.shape[1], *layout, x.dtype)
            torch.nn.functional.linear(x, dense)

        show(f"{name}, packed", tokens, timed(few, args.repeats), nbytes)
        few_repeats = max(3, args.repeats // 10)
        show(f"{name}, dequantize + BLAS", tokens, timed(many, few_repeats), nbytes)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--formats", nargs="+", default=["nf4", "nf3", "nf2"])
    parser.add_argument("--tokens", nargs="+", type=int, default=[1, 4, 16, 64])
    parser.add_argument("--shape", default="11008x4096")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--repeats", type=int, default=200)
    args = parser.parse_args()
    if why := why_no_library():
        raise SystemExit(why)
    torch.set_num_threads(args.threads)
    library = find_library()
    assert library is not None
    rows, columns = map(int, args.shape.split("x"))
    names = [line for line in _cpuinfo() if line.startswith("model name")]
    model = names[0].partition(":")[2].strip() if names else platform.processor()
    load = os.getloadavg()[0]
    print(f"{model}, {os.cpu_count()} CPUs, {args.threads} threads, {current_isa(library)}")
    print(f"torch {torch.__version__}, {args.shape}, bfloat16 x, load before {load:.1f}\n")
    print("| path | tokens | least, ms | median, ms | cpu, ms | GB/s |")
    print("|---|--:|--:|--:|--:|--:|")
    dense = cycle([torch.randn(rows, columns).bfloat16() for _ in range(2)])
    for tokens in args.tokens:
        x = torch.randn(tokens, columns).bfloat16()
        times = timed(lambda x=x: torch.nn.functional.linear(x, next(dense)), args.repeats)
        show("torch bf16", tokens, times, 2 * rows * columns)
    for name in args.formats:
        bench(name, (rows, columns), args)
    print(f"\nload after {os.getloadavg()[0]:.1f}")


def _cpuinfo() -> list[str]:
    path = Path("/proc/cpuinfo")
    return path.read_text().splitlines() if path.exists() else []


if __name__ == "__main__":
    main()
