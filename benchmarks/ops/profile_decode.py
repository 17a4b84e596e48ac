"""Kernels of one decoded token, by name: what a step of a Llama-2-7B shape spends its time on.

    python benchmarks/ops/profile_decode.py [--format nf4] [--kind fused] [--layers 8]
        [--rank 64] [--context 1024]

Models and kinds are those of bench_decode.py, one CUDA graph a step. Sums are over one step, as the
profiler saw them; "idle" is the step's time less that of its kernels, negative where they overlap.
"""

from __future__ import annotations

import argparse
from collections import Counter

import torch
from bench_decode import KINDS, make_decoder, make_model, step_times
from torch.profiler import ProfilerActivity, profile

from loftq.integrations.inference import prepare_for_inference

STEPS = 5


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--format", default="nf4")
    parser.add_argument("--kind", choices=(*KINDS, "dense"), default="fused")
    parser.add_argument("--rank", type=int, default=64)
    parser.add_argument("--context", type=int, default=1024)
    parser.add_argument("--layers", type=int, default=8)
    args = parser.parse_args()
    model = make_model(args.format, args.layers, args.rank)
    if args.kind == "folded":
        prepare_for_inference(model)
    median = step_times(model, 1, args.context, 30, args.kind)[0]
    decoder = make_decoder(model, 1, args.context + STEPS + 8, args.kind)
    token = decoder.prefill(torch.randint(0, 32000, (1, args.context))).argmax(-1)
    with profile(activities=[ProfilerActivity.CUDA]) as seen:
        for _ in range(STEPS):
            token = decoder.step(token).argmax(-1)
        torch.cuda.synchronize()
    times, counts = Counter[str](), Counter[str]()
    for event in seen.events():
        times[event.name] += event.device_time / STEPS
        counts[event.name] += 1
    print(f"{args.format}, {args.layers} layers, rank {args.rank}: {median:.3f} ms a token")
    print("| us a token | launches | kernel |\n|--:|--:|---|")
    for name, us in times.most_common(25):
        print(f"| {us:.1f} | {counts[name] / STEPS:.0f} | {name[:110]} |")
    busy = sum(times.values())
    print(f"| {busy:.1f} | {sum(counts.values()) / STEPS:.0f} | all |")
    print(f"| {1e3 * median - busy:.1f} | | idle |")


if __name__ == "__main__":
    main()
