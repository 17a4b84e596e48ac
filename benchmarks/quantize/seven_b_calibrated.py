"""Quantize a Llama-2-7B-shaped checkpoint with a method that calibrates: seconds and memory.

    python benchmarks/quantize/seven_b_calibrated.py FOLDER [--device cuda] [--blocks 32]
        [--method fast] [--format nf2] [--windows 128] [--context 1024] [--rank 64] [--stop-after K]

FOLDER/source is made first if missing: random bf16 weights (seven_b.py), a tokenizer of one token
a word, and as much text of random words as the windows hold. The row is one `loftq.quantize`, as
any caller would run it: `calibrate` is the time until the statistics of the last block are taken,
`solve` that in which any batch was being solved, `rest` what reading, writing and hashing add.
--stop-after ends the run after K batches; the next call finds the folder, resumes, and its row
counts what was left. What fills a solve is in calibrated_parts.py.
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
    """One quantization; seconds, GB and errors."""
    cuda = args.device.startswith("cuda")
    if cuda:
        torch.cuda.reset_peak_memory_stats()
    start = time.perf_counter()
    calibrated, peak, batches = start, 0.0, 0

    def on_block(path: str, done: int, total: int) -> None:
        nonlocal calibrated, peak
        calibrated = time.perf_counter()
        peak = torch.cuda.max_memory_allocated() / 1e9 if cuda else 0.0

    def on_batch(batch: object, records: object, known: bool) -> None:
        nonlocal batches
        batches += not known
        if batches == args.stop_after:
            raise Stopped

    with PeakMemory() as memory:
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
    wall = time.perf_counter() - start
    taken, solve = calibrated - start, result.timings["solve"]
    records = result.records
    return {
        "wall": wall,
        "calibrate": taken,
        "solve": solve,
        "rest": wall - taken - solve,
        "GPU calibrating, GB": peak,
        "GPU, GB": torch.cuda.max_memory_allocated() / 1e9 if cuda else 0.0,
        "anonymous, GB": (memory.peak - memory.start) / 1e9,
        "output error": sum(r["output_error"] for r in records) / len(records),
        "of rounding": sum(r["plain_output_error"] for r in records) / len(records),
    }


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
    try:
        row = measure(source, output, args)
    except Stopped:
        print(f"stopped after {args.stop_after} batches", flush=True)
        return
    shutil.rmtree(output, ignore_errors=True)
    print(json.dumps({"method": args.method, "format": args.format, "blocks": args.blocks, **row}))
    print(f"| method | format | blocks | {' | '.join(row)} |")
    print("|---|---|--:|" + "--:|" * len(row))
    cells = " | ".join(f"{value:.3f}" for value in row.values())
    print(f"| {args.method} | {args.format} | {args.blocks} | {cells} |")


if __name__ == "__main__":
    main()
