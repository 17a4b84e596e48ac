"""Seconds of every part of a calibrated solve, shape by shape: where the time of `fast` goes.

    python benchmarks/quantize/calibrated_parts.py [--device cuda] [--format nf2]
        [--shapes 4096x4096 11008x4096 4096x11008] [--rank 64] [--repeats 3] [--stack 1]

Weights are random, the Gram is that of random tokens with a decaying spectrum. A row is the median
of the repeats after one that warms up. The last rows are whole solves: one step of `fast` (its five
take five times that, less the metric) and QERA-exact.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from loftq.formats import FormatSpec, default_fit, parse_format
from loftq.lowrank import CholeskyRoot, Metric, WhitenedSolver, make_solver
from loftq.methods import METHODS, LayerProblem, ProblemStatistics
from loftq.rounding import Gptq, damped, descend, output_error, refit_scales
from loftq.schedules.projection import less_span, normalized, without

DAMPING = 0.03


@dataclass(frozen=True)
class Case:
    """One stack of weights and the Gram of their inputs."""

    W: Tensor
    gram: Tensor
    spec: FormatSpec
    rank: int

    @property
    def fit(self) -> str:
        return default_fit(self.spec)

    def problem(self) -> LayerProblem:
        n, _, in_features = self.W.shape
        known = ProblemStatistics(
            mean_square=self.gram.diagonal(dim1=1, dim2=2).double(),
            largest_mean=self.gram.diagonal(dim1=1, dim2=2).double().sqrt(),
            gram=self.gram,
            tokens=(4 * in_features,) * n,
            dropped=(0,) * n,
        )
        return LayerProblem(
            names=tuple(f"layer.{i}" for i in range(n)),
            weights=self.W,
            spec=self.spec,
            rank=self.rank,
            scaling=1.0,
            scale_fit=self.fit,
            seeds=tuple(range(n)),
            statistics=known,
        )


def make_case(shape: tuple[int, int], args: argparse.Namespace) -> Case:
    """Random weights and a Gram of 2 in_features tokens."""
    out_features, in_features = shape
    g = torch.Generator(args.device).manual_seed(0)
    W = 0.02 * torch.randn(args.stack, out_features, in_features, generator=g, device=args.device)
    x = torch.randn(2 * in_features, in_features, generator=g, device=args.device)
    x *= torch.arange(1, in_features + 1, device=args.device) ** -0.25
    gram = (x.mT @ x / len(x)).expand(args.stack, -1, -1).contiguous()
    return Case(W, gram, parse_format(args.format), args.rank)


def clock(work: Callable[[], object], repeats: int, device: str) -> float:
    """Median seconds of a call."""

    def settle() -> None:
        if device.startswith("cuda"):
            torch.cuda.synchronize()

    spent = []
    for _ in range(repeats + 1):
        settle()
        start = time.perf_counter()
        work()
        settle()
        spent.append(time.perf_counter() - start)
    return statistics.median(spent[1:])


def parts(case: Case) -> dict[str, Callable[[], object]]:
    """Name -> what is timed."""
    W, gram, spec, rank = case.W, case.gram, case.spec, case.rank
    H = damped(gram, DAMPING)
    gptq = Gptq(gram, spec, fit=case.fit, damping=DAMPING)
    rounded, values = gptq.draft(W)
    root = CholeskyRoot(gram, damping=1e-4)
    metric = Metric(root)
    solver = WhitenedSolver(make_solver("chebyshev", rank, torch.Generator()), metric)
    A = solver.solve(W - values).A.double()
    one = METHODS["fast"].with_options(iterations=1)
    return {
        "Cholesky of the metric": lambda: CholeskyRoot(gram, damping=1e-4),
        "H_A and A": lambda: without(normalized(A, H), H),
        "W less its part in A": lambda: less_span(W, A),
        "factors of GPTQ": lambda: Gptq(gram, spec, fit=case.fit, damping=DAMPING),
        "GPTQ sweep": lambda: gptq.draft(W),
        "refit of scales": lambda: refit_scales(W, H, rounded),
        "descent sweep": lambda: descend(W, H, rounded),
        "output error": lambda: output_error(W - values, H),
        "norm": lambda: metric.norm(W - values),
        "whitened correction": lambda: solver.solve(W - values),
        "fast, one step": lambda: one.solve(case.problem()),
        "qera-exact": lambda: METHODS["qera-exact"].solve(case.problem()),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--shapes", nargs="+", default=["4096x4096", "11008x4096", "4096x11008"])
    parser.add_argument("--format", default="nf2")
    parser.add_argument("--rank", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--stack", type=int, default=1)
    args = parser.parse_args()
    rows: dict[str, list[str]] = {}
    for shape in args.shapes:
        if args.device.startswith("cuda"):
            torch.cuda.reset_peak_memory_stats()
        rows_, columns = map(int, shape.split("x"))
        with torch.no_grad():
            case = make_case((rows_, columns), args)
            for name, work in parts(case).items():
                seconds = clock(work, args.repeats, args.device)
                rows.setdefault(name, []).append(f"{seconds:.4f}")
                print(f"{shape} {name}: {seconds:.4f}", flush=True)
        if args.device.startswith("cuda"):
            peak = torch.cuda.max_memory_allocated() / 1e9
            rows.setdefault("peak, GB", []).append(f"{peak:.2f}")
    print(f"\n| {args.format}, stack of {args.stack}, seconds | {' | '.join(args.shapes)} |")
    print("|---|" + "--:|" * len(args.shapes))
    for name, cells in rows.items():
        print(f"| {name} | {' | '.join(cells)} |")


if __name__ == "__main__":
    main()
