"""The LoftQ step on this CPU: plain PyTorch against each instruction set of the CPU library.

    python benchmarks/quantize/bench_cpu_rounding.py [MODEL_FOLDER] [--shape 4096x4096]
        [--formats nf4 nf3 nf2 int4] [--rounds 7] [--rank 64] [--bits 4 2] [--runs 3]

Scales by absmax and by search, codes with values, packed codes, and a whole alternation (T = 5):
`least, median` milliseconds of the CPU on one thread, which on an idle machine are those of the
clock. Paths take turns in each round, so that what else the machine does meets all. Nothing is
timed before the library's scales by absmax, codes, values and bytes are PyTorch's to the bit, and
the error under its searched scales is within 1e-5 of theirs. With a model, `loftq quantize` is run
on it in turn without and with the library: seconds on the clock, and of the CPU.
"""

from __future__ import annotations

import argparse
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial

import torch
from solver import STEPS, structured_weight
from torch import Tensor

from loftq.formats import FormatSpec, pack_codes, parse_format
from loftq.formats.grids import grid_of
from loftq.lowrank import make_solver
from loftq.ops.cpu.library import ISA, find_library, why_no_library
from loftq.rounding import round_to_nearest
from loftq.schedules import alternate

Times = dict[tuple[str, str], list[float]]


def parts(W: Tensor, spec: FormatSpec) -> dict[str, Callable[[], object]]:
    """What is timed on a weight (1, rows, columns), by name."""
    grid = grid_of(spec)
    scales, zeros = grid.fit(W, "absmax")
    codes = grid.round(W, scales, zeros)[0]
    return {
        "absmax": lambda: grid.fit(W, "absmax"),
        "search": lambda: grid.fit(W, "mse"),
        "round": lambda: grid.round(W, scales, zeros),
        "pack": lambda: pack_codes(codes, spec.bits),
    }


def results(W: Tensor, spec: FormatSpec) -> tuple[list[Tensor], float]:
    """(tensors that no path may change, error under searched scales)."""
    grid = grid_of(spec)
    absmax = grid.fit(W, "absmax")
    codes, values = grid.round(W, *absmax)
    searched = grid.round(W, *grid.fit(W, "mse"))[1]
    kept = (*absmax, codes, values, pack_codes(codes, spec.bits))
    return [part for part in kept if part is not None], (W - searched).norm().item()


def check(W: Tensor, spec: FormatSpec, paths: list[str]) -> None:
    """Stop where a path gives other numbers than plain PyTorch, the first one."""
    found = []
    for path in paths:
        os.environ[ISA] = path
        found.append(results(W, spec))
    for path, (tensors, error) in zip(paths, found, strict=True):
        same = all(map(torch.equal, tensors, found[0][0]))
        if not same or abs(error / found[0][1] - 1) > 1e-5:
            raise SystemExit(f"{spec}: {path} differs from PyTorch; nothing is timed.")


def cpu_milliseconds(call: Callable[[], object]) -> float:
    """What one call takes of this process' CPU time."""
    begun = time.process_time()
    call()
    return (time.process_time() - begun) * 1e3


def alternation(W: Tensor, spec: FormatSpec, rank: int) -> None:
    """LoftQ's loop on one weight, scales searched."""
    solver = make_solver("chebyshev", rank, torch.Generator().manual_seed(1))
    alternate(
        W,
        quantize=lambda target: round_to_nearest(target, spec, fit="mse"),
        solver=solver,
        iterations=STEPS,
    )


def timed(W: Tensor, spec: FormatSpec, paths: list[str], args: argparse.Namespace) -> Times:
    """Milliseconds by path and part."""
    times: Times = {}
    for _ in range(args.rounds + 1):
        for path in paths:
            os.environ[ISA] = path
            for part, call in parts(W, spec).items():
                times.setdefault((path, part), []).append(cpu_milliseconds(call))
    return {key: row[1:] for key, row in times.items()}  # the first one warms up


def layers(paths: list[str], args: argparse.Namespace) -> None:
    """One row for each format and path."""
    rows, columns = map(int, args.shape.split("x"))
    W = structured_weight(rows, columns, 0)
    print("| format | path | absmax | search | round | pack | LoftQ, T = 5 |")
    print("|---|---|--:|--:|--:|--:|--:|")
    for name in args.formats:
        spec = parse_format(f"{name}-g64-f32")
        check(W, spec, paths)
        times = timed(W, spec, paths, args)
        for _ in range(args.runs):
            for path in (paths[0], paths[-1]):
                os.environ[ISA] = path
                spent = cpu_milliseconds(partial(alternation, W, spec, args.rank))
                times.setdefault((path, "LoftQ"), []).append(spent)
        for path in paths:
            row = [
                shown(times.get((path, part)))
                for part in ("absmax", "search", "round", "pack", "LoftQ")
            ]
            print(
                f"| {name} | {'PyTorch' if path == 'none' else path} | {' | '.join(row)} |",
                flush=True,
            )


def shown(times: list[float] | None) -> str:
    """`least, median`."""
    if not times:
        return ""
    digits = 1 if min(times) < 100 else 0
    return f"{min(times):.{digits}f}, {sorted(times)[len(times) // 2]:.{digits}f}"


def models(folder: str, paths: list[str], args: argparse.Namespace) -> None:
    """One row for each width and path."""
    print("\n| bits | path | seconds | CPU seconds |\n|--:|---|--:|--:|")
    for bits in args.bits:
        wall: Times = {}
        for _ in range(args.runs):
            for path in (paths[0], paths[-1]):
                for part, seconds in zip(
                    ("wall", "cpu"), quantize(folder, bits, path, args), strict=True
                ):
                    wall.setdefault((path, part), []).append(seconds)
        for path in (paths[0], paths[-1]):
            print(
                f"| {bits} | {path} | {shown(wall[path, 'wall'])} | {shown(wall[path, 'cpu'])} |",
                flush=True,
            )


def quantize(folder: str, bits: int, path: str, args: argparse.Namespace) -> tuple[float, float]:
    """(wall, CPU) seconds of `loftq quantize`, the start of the program included."""
    environment = {**os.environ, ISA: path, "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
    if path != "none":
        environment.pop(ISA)
    with tempfile.TemporaryDirectory() as out:
        options = [
            "-o",
            f"{out}/model",
            "--bits",
            str(bits),
            "--rank",
            str(args.rank),
            "--device",
            "cpu",
        ]
        command = [sys.executable, "-m", "loftq", "quantize", folder, *options]
        before, begun = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
        subprocess.run(command, env=environment, check=True, stdout=subprocess.DEVNULL)
        wall, after = time.perf_counter() - begun, resource.getrusage(resource.RUSAGE_CHILDREN)
    return wall, after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("model", nargs="?")
    parser.add_argument("--shape", default="4096x4096")
    parser.add_argument("--formats", nargs="*", default=["nf4", "nf3", "nf2", "int4"])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--rank", type=int, default=64)
    parser.add_argument("--bits", nargs="+", type=int, default=[4, 2])
    parser.add_argument("--runs", type=int, default=3)
    args = parser.parse_args()
    os.environ.pop(ISA, None)
    if why := why_no_library():
        raise SystemExit(why)
    torch.set_num_threads(1)
    library = find_library()
    assert library is not None
    paths = ["none", *library.isas]
    print(f"torch {torch.__version__}, one thread, load before {os.getloadavg()[0]:.1f}\n")
    layers(paths, args)
    if args.model:
        models(args.model, paths, args)
    print(f"\nload after {os.getloadavg()[0]:.1f}")


if __name__ == "__main__":
    main()
