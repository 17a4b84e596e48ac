"""`export --to lora`: validation loss on the original model beside that of the packed one.

    python benchmarks/export/to_lora.py MODEL_FOLDER --work WORK [--bits 4 3 2] [--seeds 0 1]

Trains the start adapter on the training part of the demo's essays for tens of steps, exports it for
the original model, and scores both on the evaluation part, in float32, in the same process. A seed
is an order of the training windows; outputs of `quantize` in WORK are used again.
"""

from __future__ import annotations

import argparse
import shutil
import time
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging

import loftq
from loftq.eval import encode, lora_gap, perplexity
from loftq.integrations.peft import backbone_of, write_lineage
from loftq.lab.text import demo_text, windows
from loftq.train.short import tune_briefly

CONTEXT = 256
CHOICES = {4: "nf4-g64-dq", 3: "nf3-g64-dq", 2: "nf2-g64-dq"}


def row(
    args: argparse.Namespace, bits: int, seed: int, train: torch.Tensor, ids: torch.Tensor
) -> str:
    """Train, export, score."""
    place, packed = args.work / f"{bits}-{seed}", args.work / f"packed-{bits}"
    shutil.rmtree(place, ignore_errors=True)
    if not (packed / "loftq.json").is_file():
        loftq.quantize(args.model, packed, format=CHOICES[bits], rank=args.rank, device=args.device)
    model = loftq.load(packed, trainable=True, dtype=torch.float32).to(args.device)
    before = perplexity(model, ids, context=CONTEXT).nll
    order = torch.randperm(len(train), generator=torch.Generator().manual_seed(seed))
    start = time.perf_counter()
    windows_ = train[order].to(args.device)
    tune_briefly(model, windows_, steps=args.steps, learning_rate=args.learning_rate)
    seconds = time.perf_counter() - start
    model.save_pretrained(place / "trained")
    write_lineage(place / "trained", backbone_of(model.get_base_model()))
    del model
    loftq.export(packed, to="lora", output=place / "lora", adapter=place / "trained")
    gap = lora_gap(
        packed, place / "lora", ids, adapter=place / "trained", context=CONTEXT,
        dtype="float32", device=args.device,
    )  # fmt: skip
    shutil.rmtree(place)
    return (
        f"| {bits} | {CHOICES[bits]} | {seed} | {before:.4f} | {gap.packed:.4f} | "
        f"{gap.original:.4f} | {gap.gap:+.4f} | {seconds:.0f} |"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--bits", type=int, nargs="+", default=[4, 3, 2])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1])
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--learning-rate", type=float, default=2e-4)
    args = parser.parse_args()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    texts = (encode(tokenizer, part) for part in demo_text())
    train, ids = windows(next(texts), CONTEXT), next(texts)
    original = AutoModelForCausalLM.from_pretrained(args.model, dtype="float32").to(args.device)
    print(f"original, untrained: {perplexity(original, ids, context=CONTEXT).nll:.4f} nats a token")
    print("| bits | format | seed | packed, start | packed, trained | original + lora | gap | s |")
    print("|--:|---|--:|--:|--:|--:|--:|--:|", flush=True)
    for seed in args.seeds:
        for bits in args.bits:
            print(row(args, bits, seed, train, ids), flush=True)


if __name__ == "__main__":
    main()
