"""WikiText-2 perplexity of a packed causal model before any tuning, by method, format and fit.

    python benchmarks/quality/wikitext.py MODEL_FOLDER --data wiki.test.raw.gz [--device cuda]
        --rows loftq-paper:nf2-g64-f32:absmax:64 loftq:nf2-g64-f32:mse:64 ...

A row is METHOD:FORMAT:FIT:RANK. Protocol `gptq`: joined text, windows of 2048 without overlap, all
of them, float32.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from packed import pack
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging

from loftq.eval import perplexity, read_text

ROWS = (
    "qlora:nf4:mse:64",
    "loftq:nf4:mse:64",
    "loftq-paper:nf2-g64-f32:absmax:64",
    "loftq:nf2-g64-f32:mse:64",
    "loftq:nf2-g64-dq:mse:64",
    "loftq:snf2-g64-dq:mse:64",
    "loftq:int2-g64-dq:mse:64",
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--windows", type=int, default=None)
    parser.add_argument("--rows", nargs="+", default=ROWS)
    args = parser.parse_args()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    ids = tokenizer(read_text(args.data), return_tensors="pt").input_ids[0]

    def fresh() -> object:
        model = AutoModelForCausalLM.from_pretrained(args.model, dtype="float32")
        return model.eval().to(args.device)

    def score(model: object) -> str:
        found = perplexity(model, ids, context=2048, windows=args.windows, batch=4)
        return f"{found.perplexity:.4g} | {found.windows}"

    errors = "mean error | global error"
    print(f"| method | format | fit | rank | bits | {errors} | seconds | perplexity | windows |")
    print("|---|---|---|--:|--:|--:|--:|--:|--:|--:|")
    print(f"| reference | - | - | - | - | 0 | 0 | - | {score(fresh())} |", flush=True)
    for row in args.rows:
        method, name, fit, rank = row.split(":")
        packed = pack(fresh(), method=method, format=name, scale_fit=fit, rank=int(rank))
        print(
            f"| {method} | {name} | {fit} | {rank} | {packed.bits:.3f} | {packed.errors} | "
            f"{packed.seconds:.1f} | {score(packed.model)} |",
            flush=True,
        )


if __name__ == "__main__":
    main()
