"""Relative weight error of LoftQ on Gaussian weights: formats x iterations, and alpha/r ignored.

    python benchmarks/quality/gaussian.py [--size 768] [--rank 32] [--seeds 1]

Prints two markdown tables: the error after T alternations for each format (last iterate, exact
solver, float32 scales, as `loftq-paper`), and what becomes of the same factors when alpha/r is
ignored, as the paper's code and PEFT do.
"""

from __future__ import annotations

import argparse

import torch

from loftq.formats import parse_format
from loftq.lowrank import ExactSolver
from loftq.methods.base import relative_error
from loftq.rounding import round_to_nearest
from loftq.schedules import alternate

STEPS = (0, 1, 2, 5, 10)
FORMATS = (
    ("nf2-g64-f32", "absmax"),
    ("snf2-g64-f32", "absmax"),
    ("uniform2-tensor-f32", "sigma"),
    ("even2-g64-f32", "sigma"),
    ("nf3-g64-f32", "absmax"),
    ("nf4-g64-f32", "absmax"),
    ("uniform4-tensor-f32", "sigma"),
    ("nf2-g64-f32", "mse"),
    ("snf2-g64-f32", "mse"),
    ("int2-g64-f32", "mse"),
    ("nf3-g64-f32", "mse"),
    ("int3-g64-f32", "mse"),
    ("nf4-g64-f32", "mse"),
    ("int4-g64-f32", "mse"),
)


def errors_by_step(size: int, rank: int, name: str, fit: str, seed: int) -> list[float]:
    """Error at each T of STEPS, relative Frobenius norm."""
    W = torch.randn(1, size, size, generator=torch.Generator().manual_seed(seed))
    spec = parse_format(name)
    found = alternate(
        W,
        quantize=lambda target: round_to_nearest(target, spec, fit=fit),
        solver=ExactSolver(rank),
        iterations=max(STEPS),
        keep="last",
    )
    path = [found.plain_error[0].item(), *found.errors[:, 0].tolist()]
    return [path[step] for step in STEPS]


def scaling_cases(size: int, rank: int, name: str, steps: int, seed: int) -> list[float]:
    """Error with s = 1, 0.25 and 2, and of the adapter put on the plainly rounded weight."""
    W = torch.randn(1, size, size, generator=torch.Generator().manual_seed(seed))
    spec = parse_format(name)
    found = alternate(
        W,
        quantize=lambda target: round_to_nearest(target, spec, fit="absmax"),
        solver=ExactSolver(rank),
        iterations=steps,
        keep="last",
    )
    assert found.low_rank is not None
    B, A = found.low_rank.B[0], found.low_rank.A[0]
    plain = round_to_nearest(W, spec, fit="absmax")[1][0]
    values = found.rounded.decode()[0]
    cases = [relative_error(W[0], values, B, A, s) for s in (1.0, 0.25, 2.0)]
    return [found.plain_error[0].item(), *cases, relative_error(W[0], plain, B, A, 1.0)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--size", type=int, default=768)
    parser.add_argument("--rank", type=int, default=32)
    parser.add_argument("--seeds", type=int, default=1)
    args = parser.parse_args()

    def mean(rows: list[list[float]]) -> str:
        return " | ".join(f"{sum(column) / len(rows):.4f}" for column in zip(*rows, strict=True))

    print("| format | fit | " + " | ".join(f"T={step}" for step in STEPS) + " |")
    print("|---|---|" + "--:|" * len(STEPS))
    for name, fit in FORMATS:
        rows = [errors_by_step(args.size, args.rank, name, fit, s) for s in range(args.seeds)]
        print(f"| {name} | {fit} | {mean(rows)} |", flush=True)
    print("\n| format | T | rounding | s=1 | s=0.25 | s=2 | adapter on plain rounding |")
    print("|---|---|--:|--:|--:|--:|--:|")
    for name in ("nf4-g64-f32", "nf2-g64-f32"):
        for steps in (1, 5):
            rows = [scaling_cases(1024, 64, name, steps, s) for s in range(args.seeds)]
            print(f"| {name} | {steps} | {mean(rows)} |", flush=True)


if __name__ == "__main__":
    main()
