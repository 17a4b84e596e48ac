"""The filtered solver against the exact one inside the LoftQ loop: final error and seconds.

    python benchmarks/quantize/solver.py [--shapes 1024x1024 4096x4096] [--device cpu] [--no-exact]

One weight per row: Gaussian with a spread of row and column scales and a power-law low-rank part
that carries a fifth of its energy, T = 5, last iterate, float32 scales. `excess` is
error(chebyshev) / error(exact) - 1. The first, untimed run warms up.
"""

from __future__ import annotations

import argparse
import time

import torch
from torch import Tensor

from loftq.formats import parse_format
from loftq.lowrank import make_solver
from loftq.rounding import round_to_nearest
from loftq.schedules import alternate

STEPS = 5


def structured_weight(rows: int, columns: int, seed: int) -> Tensor:
    """(1, rows, columns) float32 with what real weights have: uneven scales and leading parts."""
    g = torch.Generator().manual_seed(seed)
    W = 0.02 * torch.randn(rows, columns, generator=g)
    W *= torch.exp(0.3 * torch.randn(1, columns, generator=g))
    W *= torch.exp(0.15 * torch.randn(rows, 1, generator=g))
    width = min(256, rows, columns)
    U = torch.linalg.qr(torch.randn(rows, width, generator=g))[0]
    V = torch.linalg.qr(torch.randn(columns, width, generator=g))[0]
    leading = (U * torch.arange(1, width + 1) ** -0.7) @ V.mT
    return (W + leading * (0.5 * W.norm() / leading.norm()))[None]


def loop(W: Tensor, name: str, fit: str, rank: int, solver: str) -> tuple[float, float]:
    """(final relative error, seconds)."""
    spec = parse_format(name)
    start = time.perf_counter()
    found = alternate(
        W,
        quantize=lambda target: round_to_nearest(target, spec, fit=fit),
        solver=make_solver(solver, rank, torch.Generator().manual_seed(1)),
        iterations=STEPS,
        keep="last",
    )
    error = found.errors[-1, 0].item()
    return error, time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--shapes", nargs="+", default=["1024x1024", "2048x4096", "4096x4096"])
    parser.add_argument("--rank", type=int, default=64)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--no-exact", action="store_true", help="time the filtered solver only")
    args = parser.parse_args()
    loop(structured_weight(256, 256, 0).to(args.device), "nf4-g64-f32", "mse", 16, "chebyshev")
    print("| shape | format | fit | error | excess | seconds | exact, seconds |")
    print("|---|---|---|--:|--:|--:|--:|")
    for shape in args.shapes:
        rows, columns = map(int, shape.split("x"))
        W = structured_weight(rows, columns, 0).to(args.device)
        for bits in (4, 3, 2):
            for fit in ("absmax", "mse"):
                name = f"nf{bits}-g64-f32"
                error, seconds = loop(W, name, fit, args.rank, "chebyshev")
                line = f"| {shape} | nf{bits} | {fit} | {error:.5f} |"
                if args.no_exact:
                    print(f"{line} - | {seconds:.2f} | - |", flush=True)
                    continue
                exact, exact_seconds = loop(W, name, fit, args.rank, "exact")
                excess = f"{100 * (error / exact - 1):+.4f} %"
                print(f"{line} {excess} | {seconds:.2f} | {exact_seconds:.1f} |", flush=True)


if __name__ == "__main__":
    main()
