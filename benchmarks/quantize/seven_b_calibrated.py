"""Quantize a Llama-2-7B-shaped checkpoint with a method that calibrates: seconds and memory.

    python benchmarks/quantize/seven_b_calibrated.py FOLDER [--device cuda] [--blocks 32]
        [--method fast] [--format nf2] [--windows 128] [--context 1024] [--rank 64] [--stop-after K]

FOLDER/source is made first if missing: random bf16 weights (seven_b.py), a tokenizer of one token
a word, and as much text of random words as the windows hold. The row is one `loftq.quantize`, as
any caller would run it: `calibrate` is the time until the statistics of the last block are taken,
`solve` that in which any batch was being solved; the rest is reading, writing and hashing.
--stop-after ends the run after K batches; the next call resumes it, and its row counts what was
left. What fills a solve is in calibrated_parts.py.
"""

from __future__ import annotations

import argparse
import json
import random
import shutil
import time
from pathlib import Path

import torch
from seven_b import VOCAB, PeakMemory, make_source

import loftq

RESERVED = 3  # <unk>, <s>, </s>


class Stopped(Exception):
    """The run was to end here."""


def make_text(folder: Path, tokens: int) -> Path:
    """Random words of the vocabulary, one for each token; the file."""
    path = folder / "calibration.txt"
    draw = random.Random(0)
    path.write_text(" ".join(f"w{draw.randrange(RESERVED, VOCAB)}" for _ in range(tokens)))
    return path


def make_tokenizer(folder: Path) -> None:
    """A tokenizer whose words are w3, w4, ... of the model's vocabulary."""
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import WhitespaceSplit
    from transformers import PreTrainedTokenizerFast

    words = ["<unk>", "<s>", "</s>", *(f"w{k}" for k in range(RESERVED, VOCAB))]
    core = Tokenizer(WordLevel({word: k for k, word in enumerate(words)}, unk_token="<unk>"))
    core.pre_tokenizer = WhitespaceSplit()
    special = {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>"}
    PreTrainedTokenizerFast(tokenizer_object=core, **special).save_pretrained(folder)


def measure(source: Path, output: Path, args: argparse.Namespace) -> dict[str, float]:
    """One quantization, or the part of it before --stop-after; seconds, GB and errors."""
    row: dict[str, float] = {"calibrate": 0.0}
    batches = 0
    start = time.perf_counter()

    def on_block(path: str, done: int, total: int) -> None:
        row["calibrate"] = time.perf_counter() - start
        row["GPU calibrating, GB"] = gpu_gigabytes(args.device)

    def on_batch(batch: object, records: object, known: bool) -> None:
        nonlocal batches
        batches += not known
        if args.stop_after and batches == args.stop_after:
            raise Stopped

    with PeakMemory() as memory:
        try:
            result = loftq.quantize(
                source,
                output,
                method=args.method,
                format=args.format,
                rank=args.rank,
                device=args.device,
                data=str(args.folder / "calibration.txt"),
                calibration_windows=args.windows,
                calibration_context=args.context,
                statistics=str(args.folder / "statistics"),
                on_block=on_block,
                on_batch=on_batch,
            )
        except Stopped:
            result = None
    row["wall"] = time.perf_counter() - start
    row["GPU, GB"] = gpu_gigabytes(args.device)
    row["anonymous, GB"] = (memory.peak - memory.start) / 1e9
    if result is not None:
        row["solve"] = result.timings["solve"]
        for name in ("output_error", "plain_output_error"):
            row[name] = sum(record[name] for record in result.records) / len(result.records)
    return row


def gpu_gigabytes(device: str) -> float:
    """The most that the process took from the GPU so far, with what its allocator kept back."""
    return torch.cuda.max_memory_reserved() / 1e9 if device.startswith("cuda") else 0.0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--blocks", type=int, default=32)
    parser.add_argument("--method", default="fast")
    parser.add_argument("--format", default="nf2")
    parser.add_argument("--windows", type=int, default=128)
    parser.add_argument("--context", type=int, default=1024)
    parser.add_argument("--rank", type=int, default=64)
    parser.add_argument("--stop-after", type=int, default=0, help="batches; 0 = run to the end")
    args = parser.parse_args()
    source, output = args.folder / "source", args.folder / "out"
    if not source.exists():
        make_source(source, args.blocks, args.device)
        make_tokenizer(source)
        if args.device.startswith("cuda"):
            torch.cuda.empty_cache()
    make_text(args.folder, args.windows * args.context)
    row = measure(source, output, args)
    part = f" up to {args.stop_after} batches" if args.stop_after else ""
    print(json.dumps({"method": args.method, "format": args.format, "blocks": args.blocks, **row}))
    print(f"| method | format | blocks | {' | '.join(row)} |")
    print("|---|---|--:|" + "--:|" * len(row))
    cells = " | ".join(f"{value:.3f}" for value in row.values())
    print(f"| {args.method} | {args.format} | {args.blocks}{part} | {cells} |")
    if not args.stop_after:
        shutil.rmtree(output)


if __name__ == "__main__":
    main()
