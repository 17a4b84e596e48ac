"""STS-B Spearman of encoders without any training, by format, fit and method.

    python benchmarks/quality/stsb.py MODEL_FOLDER... --data GLUE_STSB_FILE [--device cuda]
        [--formats nf4 nf3 nf2 ...] [--fits absmax mse] [--rank 16]
        [--methods qlora loftq qera-exact cloq fast --calibrate wikipedia_sample.jsonl.gz]

One markdown row per model, format, fit and method; real packed weights and adapters throughout.
`qlora` is plain rounding. These rows decide each format's default fit (formats/grids.py).
"""

from __future__ import annotations

import argparse
from pathlib import Path

from encoders import read_pairs
from packed import pack
from transformers import AutoModel, AutoTokenizer
from transformers.utils import logging

from loftq.eval.similarity import similarity_score

FORMATS = ("nf4", "nf3", "nf2", "snf4", "snf3", "snf2", "int4", "int3", "int2", "sint4", "sint3",
           "sint2", "iq4nl")  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("models", nargs="+", type=Path)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--formats", nargs="+", default=FORMATS)
    parser.add_argument("--fits", nargs="+", default=("absmax", "mse"))
    parser.add_argument("--methods", nargs="+", default=("qlora", "loftq"))
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--calibrate", help="text for methods that need it")
    parser.add_argument("--calibration-windows", type=int, default=128, help="documents of it")
    args = parser.parse_args()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    pairs, labels = read_pairs(args.data)
    print("| model | format | fit | method | bits | mean error | global error | Spearman |")
    print("|---|---|---|---|--:|--:|--:|--:|")
    for folder in args.models:
        tokenizer = AutoTokenizer.from_pretrained(folder)

        def score(model: object) -> str:
            return f"{similarity_score(model, tokenizer, pairs, labels):.2f}"  # noqa: B023

        def fresh() -> object:
            return AutoModel.from_pretrained(folder, dtype="float32").eval().to(args.device)  # noqa: B023

        print(f"| {folder.name} | reference | - | - | - | 0 | 0 | {score(fresh())} |", flush=True)
        for name in args.formats:
            for fit in args.fits:
                for method in args.methods:
                    packed = pack(
                        fresh(),
                        format=name,
                        scale_fit=fit,
                        method=method,
                        rank=args.rank,
                        data=args.calibrate,
                        calibration_windows=args.calibration_windows,
                        tokenizer=tokenizer,
                    )
                    print(
                        f"| {folder.name} | {name} | {fit} | {method} r{args.rank} | "
                        f"{packed.bits:.3f} | {packed.errors} | {score(packed.model)} |",
                        flush=True,
                    )


if __name__ == "__main__":
    main()
