"""Our kernels, decoding and training steps on the GPU that you have, beside the installed peers.

    python benchmarks/own_card.py [--minutes 10] [--output own_card.md]

Runs ops/bench_linear.py, ops/bench_decode.py and train/step_speed.py one after the other, each in a
process of its own with its share of the time, on Llama-2-7B's shapes as far as the card's memory
holds them (fewer layers where it does not). Their rows are those of benchmarks/results/. A part
that fails or runs out of its time keeps the rows it has printed, the error is written under them,
and the next one starts.
"""

from __future__ import annotations

import argparse
import importlib.util
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import torch

HERE = Path(__file__).resolve().parent
LAYER_GB = 0.41
"""A layer of Llama-2-7B in bf16."""
REST_GB = 2.5
"""Its embedding and head, the cache, CUDA itself."""
DENSE_TRAINING_GB, GRAPH_TRAINING_GB, TRAINING_GB = 20, 9.5, 8.5
"""Memory from which 2 x 2048 tokens are trained on dense weights, in graphs, one by one."""
LAST_LINES = 6
"""Of the errors of a part that failed."""


@dataclass(frozen=True)
class Part:
    """One script with its arguments.

    Attributes:
        share: Part of the whole time after which it is stopped.
    """

    title: str
    script: str
    share: float
    arguments: tuple[str, ...]


def parts(memory: float, minutes: float, folder: Path, *, bnb: bool = False) -> list[Part]:
    """What runs on a card.

    Args:
        memory: Of the card, GB.
        minutes: For all parts together; scripts that watch the time themselves are told it.
        folder: Where a script may write.
        bnb: Whether bitsandbytes decodes too.
    """
    seconds = 60 * minutes
    layers = max(1, min(32, int((memory - REST_GB) / LAYER_GB)))
    found = [
        Part(
            "Products of one layer",
            "ops/bench_linear.py",
            0.4,
            ("--peers", "--tokens", "1", "16", "64", "--seconds", f"{0.35 * seconds:.0f}"),
        ),
        Part(
            f"Decoding, batch 1, {layers} of 32 layers",
            "ops/bench_decode.py",
            0.3,
            ("--layers", str(layers), "--formats", "nf4", "nf3", "nf2", "bf16", *["bnb"] * bnb),
        ),
    ]
    if memory >= TRAINING_GB:
        paths = ["fused"] + ["graphs"] * (memory >= GRAPH_TRAINING_GB) + ["plain"]
        paths += ["bf16-fused", "bf16-graphs", "bf16"] if memory >= DENSE_TRAINING_GB else []
        written = str(folder / "steps.md")
        limit = ("--seconds", f"{0.22 * seconds:.0f}", "--output", written)
        found.append(
            Part("Training", "train/step_speed.py", 0.3, ("--paths", *paths, "--bits", "4", *limit))
        )
    return found


def run(part: Part, seconds: float) -> str:
    """What a part printed, with its end told where it was no good one."""
    command = [sys.executable, "-W", "ignore", str(HERE / part.script), *part.arguments]
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, errors="replace"
    )
    try:
        printed, errors = process.communicate(timeout=seconds)
    except subprocess.TimeoutExpired:
        process.kill()
        printed, _ = process.communicate()
        return f"{printed.rstrip()}\n\nstopped after {seconds:.0f} s\n"
    end = ""
    if process.returncode:  # below 0: the signal that ended it
        last = "\n".join(errors.strip().splitlines()[-LAST_LINES:])
        end = f"\nfailed with status {process.returncode}:\n\n```text\n{last}\n```\n"
    return printed.rstrip() + "\n" + end


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--minutes", type=float, default=10)
    parser.add_argument("--output", type=Path, default=Path("own_card.md"))
    args = parser.parse_args()
    if not torch.cuda.is_available():
        raise SystemExit("error: no CUDA device: `loftq doctor` says what is missing.")
    memory = torch.cuda.get_device_properties(0).total_memory / 1e9
    bnb = importlib.util.find_spec("bitsandbytes") is not None
    told = f"# {torch.cuda.get_device_name()}, {memory:.0f} GB, {time.strftime('%Y-%m-%d')}\n"
    for part in parts(memory, args.minutes, args.output.resolve().parent, bnb=bnb):
        call = " ".join(["python", f"benchmarks/{part.script}", *part.arguments])
        told += f"\n## {part.title}\n\n    {call}\n\n{run(part, 60 * args.minutes * part.share)}"
        args.output.write_text(told, encoding="utf-8")
        print(f"{part.title}: in {args.output}", flush=True)


if __name__ == "__main__":
    main()
