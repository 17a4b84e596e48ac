"""Tokens a second of a training step: PEFT's layers, the training layer, graphs; packed and bf16.

    python benchmarks/train/step_speed.py --output speed.md --profile profile.txt

Each row is a model of the same shape with random weights, the same float32 adapters and AdamW on
all linear layers, checkpointing, autocast and the loss of `loftq train`, in one process. Times are
medians over the steps after the warm-up; "peak" is torch.cuda.max_memory_allocated over them,
weights included, and "reserved" what the allocator took for it; the loss is the first and the
last. `offload`: inputs of blocks in host memory, `-8bit`: states of AdamW in 8 bits, `-keep8`: the
last 8 blocks not checkpointed, `bf16-...`: the same on dense weights; last come the percentages by
which packed weights are slower. One row that fails does not stop the others, and none starts after
--seconds. On a CPU (--device cpu --shape tiny) the script only shows that it runs.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import time
import traceback
from dataclasses import replace
from pathlib import Path
from typing import Any

os.environ.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")

import torch

sys.path.insert(0, str(Path(__file__).parent))
from machine import machine, release
from shapes import dense_model, random_model, subject, with_adapter
from step import train_steps

from loftq.train.memory.predict import TrainingSettings
from loftq.train.prepare import add_fused_head

WARM_UP = 3
PATHS: dict[str, dict[str, Any]] = {
    "graphs": {"fused": True, "graphs": True},
    "fused": {"fused": True},
    "offload": {"fused": True, "offload": True},
    "offload-8bit": {"fused": True, "offload": True, "optimizer": "adamw_8bit"},
    "graphs-keep8": {"fused": True, "graphs": True, "keep": 8},
    "plain": {"fused": False},
    "bf16": {"fused": False},
    "bf16-fused": {"fused": True},
    "bf16-graphs": {"fused": True, "graphs": True},
}
"""Name of a path -> how `train_steps` takes it; those of DENSE on the model before it is packed."""
DENSE = "bf16"
TOP = 22
"""Kernels that a profile shows."""
Times = dict[tuple[int, str, int], float]
"""(bits, path, batch) -> seconds of a step."""
HEAD = (
    "| model | batch | path | ms a step | p20 | p80 | tokens/s | peak GB | reserved GB | loss |",
    "| --- | --: | --- | --: | --: | --: | --: | --: | --: | --- |",
)


def main() -> None:
    """The table, and profiles where asked for."""
    given = _options()
    start = time.perf_counter()
    lines, times = [machine(given.device), "", *HEAD], Times()
    for bits in given.bits:
        for path in given.paths:
            repeated = path.startswith(DENSE) and bits != given.bits[0]
            if time.perf_counter() - start > given.seconds or repeated:
                continue
            try:
                lines += _rows(given, bits, path, start, times)
            except Exception as error:
                traceback.print_exc()
                lines.append(f"| {bits} bits | {path}: {str(error).splitlines()[0][:120]} |")
            release()
            given.output.write_text("\n".join(lines) + "\n", encoding="utf-8")
    lines += ["", *_slowdowns(times)]
    given.output.write_text("\n".join(lines) + "\n", encoding="utf-8")
    print("\n" + "\n".join(lines), flush=True)


def _slowdowns(times: Times) -> list[str]:
    """What packed weights cost: each row against the same path on dense 16-bit weights."""
    found = []
    for (bits, path, batch), seconds in times.items():
        dense = next(
            (t for (_, p, b), t in times.items() if (p, b) == (f"{DENSE}-{path}", batch)), 0
        )
        if dense:
            more = 100 * (seconds / dense - 1)
            found.append(f"{bits} bits, {path}, batch {batch}: {more:+.1f} % on {DENSE}-{path}")
    return found


def _rows(given: argparse.Namespace, bits: int, path: str, start: float, times: Times) -> list[str]:
    described = subject(given.shape, rank=given.rank, bits=bits)
    dtype = torch.bfloat16
    torch.manual_seed(0)  # the same weights and adapters on every path of the same bits
    if path.startswith(DENSE):
        base = dense_model(given.shape, device=given.device, dtype=dtype)
    else:
        base = random_model(given.shape, described, device=given.device, dtype=dtype)
    model = with_adapter(base, described, given.rank)
    rows = []
    for batch in given.batch:
        if time.perf_counter() - start > given.seconds:
            break
        rows.append(_row(model, given, batch, path, bits, times))
        print(rows[-1], flush=True)
        if given.profile is not None and batch == given.batch[0]:
            _profile(model, given, batch, path, bits)
    return rows


def _row(
    model: Any, given: argparse.Namespace, batch: int, path: str, bits: int, times: Times
) -> str:
    settings = _settings(model, given, batch)
    paths, cuda = PATHS[path], given.device == "cuda"
    warm = train_steps(model, settings, WARM_UP, device=given.device, **paths)
    release()
    if cuda:
        torch.cuda.reset_peak_memory_stats()
    done = train_steps(model, settings, given.steps, device=given.device, **paths)
    peak = torch.cuda.max_memory_allocated() / 1e9 if cuda else float("nan")
    reserved = torch.cuda.max_memory_reserved() / 1e9 if cuda else float("nan")
    low, *_, high = statistics.quantiles(done.seconds, n=5)
    median = times[bits, path, batch] = statistics.median(done.seconds)
    name = "bf16 dense" if path.startswith(DENSE) else f"{bits} bits"
    return (
        f"| {name} | {batch} x {given.length} | {path} | {1e3 * median:.1f} | {1e3 * low:.1f} | "
        f"{1e3 * high:.1f} | {settings.tokens / median:,.0f} | {peak:.2f} | "
        f"{reserved:.2f} | {warm.losses[0]:.3f} to {done.losses[-1]:.3f} |"
    )


def _profile(model: Any, given: argparse.Namespace, batch: int, path: str, bits: int) -> None:
    """Kernels of two steps by time, and how long the GPU idled."""
    from torch.profiler import ProfilerActivity, profile, schedule

    cuda = given.device == "cuda"
    activities = [ProfilerActivity.CUDA] if cuda else [ProfilerActivity.CPU]
    settings = _settings(model, given, batch)
    wait = schedule(wait=WARM_UP, warmup=1, active=2, repeat=1)  # a graph is captured before
    with profile(activities=activities, schedule=wait) as found:
        done = train_steps(
            model, settings, WARM_UP + 3, device=given.device, on_step=found.step, **PATHS[path]
        )
    kernels: dict[str, list[float]] = {}
    for event in found.events():
        if event.name.startswith("ProfilerStep"):  # the step itself, not a kernel
            continue
        spent = event.device_time if cuda else event.self_cpu_time_total
        kernels.setdefault(event.name, []).append(spent / 1e3)
    busy, wall = sum(map(sum, kernels.values())), 1e3 * sum(done.seconds[-2:])
    with given.profile.open("a", encoding="utf-8") as file:
        print(f"\n{bits} bits, {path}: {wall / 2:.1f} ms a step under the profiler, GPU busy "
              f"{busy / 2:.1f} ms, idle {100 * (1 - busy / wall):.1f} %", file=file)  # fmt: skip
        for name, times in sorted(kernels.items(), key=lambda item: -sum(item[1]))[:TOP]:
            print(f"{sum(times) / 2:9.2f} ms {len(times) // 2:6d} x  {name[:150]}", file=file)


def _settings(model: Any, given: argparse.Namespace, batch: int) -> TrainingSettings:
    settings = TrainingSettings(batch_size=batch, length=given.length, device=given.device)
    fused = add_fused_head(model.get_base_model())
    return settings if fused else replace(settings, loss="full")


def _options() -> argparse.Namespace:
    options = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    options.add_argument("--output", type=Path, required=True)
    options.add_argument("--profile", type=Path, help="file that gets a profile of each path")
    options.add_argument("--device", default="cuda")
    options.add_argument("--shape", default="Llama-2-7B")
    options.add_argument("--bits", type=int, nargs="*", default=[4])
    options.add_argument("--paths", nargs="*", default=["fused", "plain", "bf16"])
    options.add_argument("--batch", type=int, nargs="*", default=[2])
    options.add_argument("--length", type=int, default=2048)
    options.add_argument("--rank", type=int, default=64)
    options.add_argument("--steps", type=int, default=10)
    options.add_argument("--seconds", type=float, default=75, help="start no row after this")
    return options.parse_args()


if __name__ == "__main__":
    main()
