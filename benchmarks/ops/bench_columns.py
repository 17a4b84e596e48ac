"""Sweeps over a block of columns: microseconds a launch, by tile and by plain PyTorch.

    python benchmarks/ops/bench_columns.py [--shapes 4096x64 11008x64 4096x128] [--formats nf2 int2]

A row is the median of 20 launches after 3, for weights of random numbers and a well-conditioned
factor. `reference` runs on the same GPU. Tiles are (weights, warps) of ops/triton/columns.py.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable
from functools import partial

import torch

from loftq.formats import grid_of, parse_format
from loftq.ops import columns as reference
from loftq.ops.triton import columns

TILES = ((256, 1), (512, 1), (1024, 1), (1024, 4), (2048, 4))


def microseconds(work: Callable[[], object], repeats: int) -> float:
    """Median time of a call on the GPU."""
    spent = []
    for k in range(repeats + 3):
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        work()
        end.record()
        torch.cuda.synchronize()
        if k >= 3:
            spent.append(1000 * begin.elapsed_time(end))
    return statistics.median(spent)


def row(sweep: str, shape: str, name: str) -> list[float]:
    """Microseconds of one launch in every tile, then of plain PyTorch."""
    rows, width = map(int, shape.split("x"))
    grid = grid_of(parse_format(name))
    W = torch.randn(1, rows, width, device="cuda")
    square = torch.eye(width, device="cuda") + 0.01 * torch.rand(1, width, width, device="cuda")
    scales, levels = torch.full((1, rows, 1), 0.5, device="cuda"), grid.codebook(W.device)
    zeros = None if levels is not None else torch.ones_like(scales)
    inputs = (W, square) if sweep == "round_columns" else (W, W.clone(), square)
    arguments = (*inputs, scales, zeros, levels, grid.top)
    slow = partial(getattr(reference, f"{sweep}_reference"), *arguments)
    cells, wanted = [], slow()
    for columns.BLOCK_WEIGHTS, columns.WARPS in TILES:
        fast = partial(getattr(columns, sweep), *arguments)
        assert all(map(torch.equal, fast(), wanted)), "a wrong result is not timed"
        cells.append(microseconds(fast, 20))
    return [*cells, microseconds(slow, 3)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--shapes", nargs="+", default=["4096x64", "11008x64", "4096x128"])
    parser.add_argument("--formats", nargs="+", default=["nf2", "nf4", "int2"])
    args = parser.parse_args()
    tiles = " | ".join(f"{weights}, {warps}" for weights, warps in TILES)
    print(f"| sweep | format | rows x columns | {tiles} | reference |")
    print("|---|---|---|" + "--:|" * (len(TILES) + 1))
    for name in args.formats:
        for shape in args.shapes:
            for sweep in ("round_columns", "descend_columns"):
                line = " | ".join(f"{cell:.0f}" for cell in row(sweep, shape, name))
                print(f"| {sweep} | {name} | {shape} | {line} |", flush=True)


if __name__ == "__main__":
    main()
