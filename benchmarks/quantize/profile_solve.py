"""Where the time of a solve goes: kernels, gaps between them, and what the host does meanwhile.

    python benchmarks/quantize/profile_solve.py MODEL_FOLDER [--device cuda] [--batches 12]
        [--format nf4] [--fit mse] [--rank 64]

Solves some batches of the plan, as `loftq.quantize` does but without writing: once to warm up, once
on the clock, once under torch.profiler. `busy` is the time in which at least one kernel ran.
"""

from __future__ import annotations

import argparse
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch._C._profiler import _ExperimentalConfig
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

import loftq
from loftq.checkpoint import Checkpoint, open_checkpoint
from loftq.lowrank.chebyshev import OVERSAMPLE
from loftq.pipeline.plan import Batch, Plan
from loftq.pipeline.stream import solved_batches, union_seconds

SHOWN = 15


def solve(plan: Plan, batches: Sequence[Batch], source: Checkpoint) -> float:
    """Seconds of solving `batches`, reading included."""
    start = time.perf_counter()
    for _ in solved_batches(plan, batches, source):
        pass
    if plan.device.startswith("cuda"):
        torch.cuda.synchronize()
    return time.perf_counter() - start


def tally(events: Sequence[Any], seconds: str) -> list[tuple[str, int, float]]:
    """(name, calls, seconds) of the events of one kind, longest first."""
    spent: Counter[str] = Counter()
    calls: Counter[str] = Counter()
    for event in events:
        spent[event.name] += getattr(event, seconds)
        calls[event.name] += 1
    return [(name, calls[name], total / 1e6) for name, total in spent.most_common(SHOWN)]


def show(title: str, rows: Sequence[tuple[str, int, float]]) -> None:
    """One markdown table."""
    print(f"\n| {title} | calls | seconds |\n|---|--:|--:|")
    for name, calls, seconds in rows:
        print(f"| {name[:90].replace('|', '/')} | {calls} | {seconds:.3f} |")


def eigh_seconds(device: str, size: int, stack: int = 8, repeats: int = 5) -> float:
    """Seconds of one float32 eigenproblem of a stack, on one thread of the host or the device."""
    torch.set_num_threads(1)
    G = torch.randn(stack, size, size, device=device)
    G = G @ G.mT
    torch.linalg.eigh(G)
    start = time.perf_counter()
    for _ in range(repeats):
        torch.linalg.eigh(G)[0].sum().item()
    return (time.perf_counter() - start) / (repeats * stack)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--batches", type=int, default=12)
    parser.add_argument("--format", default="nf4")
    parser.add_argument("--fit", default="mse")
    parser.add_argument("--rank", type=int, default=64)
    args = parser.parse_args()
    plan = loftq.plan(
        args.folder, device=args.device, format=args.format, scale_fit=args.fit, rank=args.rank
    )
    source = open_checkpoint(args.folder)
    # Spread over the plan, so that every shape takes part.
    step = max(1, len(plan.batches) // args.batches)
    batches = plan.batches[::step][: args.batches]
    share = sum(layer.weights for batch in batches for layer in batch.layers) / plan.weights
    solve(plan, batches, source)
    wall = solve(plan, batches, source)
    cuda = args.device.startswith("cuda")
    activities = [ProfilerActivity.CPU] + ([ProfilerActivity.CUDA] if cuda else [])
    # Else only the thread that started the profiler is seen, and others solve.
    everyone = _ExperimentalConfig(profile_all_threads=True)
    with profile(activities=activities, experimental_config=everyone) as profiler:
        profiled = solve(plan, batches, source)
    events = profiler.events()
    kernels = [e for e in events if e.device_type == DeviceType.CUDA]
    spans = [(e.time_range.start / 1e6, e.time_range.end / 1e6) for e in kernels]
    busy = union_seconds(spans)
    show("kernel", tally(kernels, "device_time_total"))
    show(
        "host", tally([e for e in events if e.device_type == DeviceType.CPU], "self_cpu_time_total")
    )
    print("\n| what | seconds |\n|---|--:|")
    taken = f"{len(batches)} of {len(plan.batches)} batches, {share:.1%} of the weights"
    print(f"| {taken} | {wall:.2f} |")
    print(f"| the same for the whole model | {wall / share:.2f} |")
    print(f"| under the profiler | {profiled:.2f} |")
    print(f"| kernels, summed | {sum(end - start for start, end in spans):.2f} |")
    print(f"| device busy | {busy:.2f} |")
    print(f"| device busy, whole model | {busy / share:.2f} |")
    block = args.rank + OVERSAMPLE
    for device in dict.fromkeys(("cpu", args.device)):
        print(
            f"| eigh {block} x {block} on {device}, each of 8 | {eigh_seconds(device, block):.5f} |"
        )


if __name__ == "__main__":
    main()
