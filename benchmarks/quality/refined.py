"""Refinements of one start, before (and, with --tune, after) a short tuning: perplexity, seconds.

    python benchmarks/quality/refined.py MODEL_FOLDER --data wiki.test.raw.gz
        --calibrate c4_sample.jsonl.gz --work FOLDER [--choose wiki.valid.raw.gz]
        [--gsm8k test.jsonl] [--tune wiki.valid.raw.gz --seeds 3]
        [--rows fast:int2-g64-dq:64:block-distill fast:int2-g64-dq:64:distill:epochs=4 ...]
        [--refine-text FILE --refine-windows N] [--device cuda] [--out rows.jsonl]

A row is METHOD:FORMAT:RANK:REFINEMENT[:epochs=E/E][:rate=R/R][:batch=B/B][:error=KIND/KIND], and
likewise hidden=, kl= and language=, with a value per stage; `none` is the start itself. Rows of one
METHOD:FORMAT:RANK refine the same packed folder, quantized once into --work. Arguments, texts,
protocol and tuning are those of calibrated.py, beside whose rows these may stand.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import calibrated
import torch
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging

import loftq
from loftq.checkpoint import open_checkpoint
from loftq.eval import encode, read_text
from loftq.integrations import calibrate, discover
from loftq.integrations.blocks import CheckpointBlocks
from loftq.integrations.refine import Step, refine_adapter
from loftq.pipeline.config import QuantizeConfig
from loftq.refine import REFINEMENTS, Refinement

KINDS = {
    "epochs": float, "rate": float, "batch": int, "error": str,
    "hidden": float, "kl": float, "language": float,
}  # fmt: skip


def refinement_of(name: str, pairs: list[str]) -> Refinement:
    """The row of that name with the values of KEY=VALUE/VALUE, one per stage."""
    found = REFINEMENTS[name]
    for pair in pairs:
        key, _, values = pair.partition("=")
        each = [KINDS[key](value) for value in values.split("/")]
        stages = zip(found.stages, each, strict=True)
        found = replace(found, stages=tuple(replace(s, **{key: value}) for s, value in stages))
    return found


def packed(args: argparse.Namespace, start: str) -> tuple[Path, QuantizeConfig]:
    """The folder of a start, quantized now if it is not there."""
    method, name, rank = start.split(":")
    folder = args.work / start.replace(":", "-")
    config = QuantizeConfig(
        method=method,
        format=name,
        rank=int(rank),
        data=str(args.calibrate),
        calibration_windows=args.calibration_windows,
        calibration_context=args.calibration_context,
        statistics=args.statistics or str(args.work / "statistics"),
        refine="none",
    )
    if not (folder / "config.json").exists():
        options = {k: v for k, v in config.to_dict().items() if k != "version"}
        loftq.quantize(args.model, folder, device=args.device, **options)
    return folder, config


def refined(args: argparse.Namespace, row: str, source: Any) -> tuple[dict, dict]:
    """What is known of a row without its perplexities, and its starts for tuning."""
    method, name, rank, refine, *pairs = row.split(":")
    begin = time.perf_counter()
    folder, config = packed(args, f"{method}:{name}:{rank}")
    chosen, device = refinement_of(refine, pairs), torch.device(args.device)
    model = loftq.load(folder, trainable=True)
    record = json.loads((folder / "loftq.json").read_text())
    layout = discover.describe_folder(args.model, {k: e.shape for k, e in source.tensors.items()})
    tokenizer, about = AutoTokenizer.from_pretrained(args.model), discover.load_config(args.model)
    text = {}
    if args.refine_text is not None:
        text = {"data": str(args.refine_text), "calibration_windows": args.refine_windows}
    windows = calibrate.read_windows(
        replace(config, refine="block", **text), layout, tokenizer, about
    )
    quantized = time.perf_counter()

    told = [0.0]

    def tell(step: Step) -> None:
        if (seconds := time.perf_counter() - quantized) - told[0] > 5:
            told[0] = seconds
            at = f"{step.scope} {step.done + step.share:.2f} of {step.units}"
            print(f"  {seconds:.0f} s: {at}, loss {step.loss}", flush=True)

    with tempfile.TemporaryDirectory() as state:
        stages = refine_adapter(
            model, chosen, windows, lambda: CheckpointBlocks(args.model, source, device),
            state=Path(state), device=device, listener=tell,
        )  # fmt: skip
    done = time.perf_counter()
    sums = record["totals"]
    size = sums["packed_bytes"] + sums["unquantized_bytes"] + sums["adapter_bytes"]
    found = {
        "row": row,
        "bits": sums["bits_per_weight"],
        "total_bytes": size,
        "quantize_s": quantized - begin,
        "solve_s": done - quantized,
        "output_error": float("nan"),
        "tokens": windows.tokens,
        "stages": [brief(stage) for stage in stages],
    }
    return found, starts_of(model, device)


def brief(stage: dict) -> dict:
    """Choices of a stage, and the mean held-out loss over its units before and after."""
    units = stage["units"]
    means = {key: sum(unit[key] for unit in units) / len(units) for key in ("start", "best")}
    last = [units[-1]["losses"]] if stage["scope"] == "model" else []
    return {k: v for k, v in stage.items() if k != "units"} | means | {"trajectory": last}


def starts_of(model: Any, device: torch.device) -> dict[str, calibrated.Start]:
    """Q, A and B of every adapted layer, decoded from the packed form."""
    starts = {}
    for path, module in model.get_base_model().named_modules():
        if not hasattr(module, "lora_A"):
            continue
        s = module.scaling["default"] ** 0.5
        A, B = module.lora_A["default"].weight.detach(), module.lora_B["default"].weight.detach()
        Q = module.base_layer.dequantize(torch.float32).detach()
        starts[path] = calibrated.Start(*(t.float().to(device) for t in (Q, s * A, s * B)))
    return starts


def measure(args: argparse.Namespace, model: nn.Module, row: str, source: Any, texts: dict) -> dict:
    """All numbers of a row but those after tuning, and its starts."""
    found, starts = refined(args, row, source)
    adapted = calibrated.replaced(model, starts)
    return found | {"before": calibrated.scored(args, adapted, texts), "starts": starts}


def main() -> None:
    parser = calibrated.arguments(__doc__)
    parser.add_argument("--refine-text", type=Path, help="text to refine on; default --calibrate")
    parser.add_argument("--refine-windows", type=int, default=128, help="of --refine-text")
    parser.add_argument("--work", type=Path, required=True, help="folder for packed starts")
    parser.add_argument("--rows", nargs="+", required=True)
    args = parser.parse_args()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    begin = time.perf_counter()
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    texts = calibrated.read_texts(args, tokenizer)
    ids = None if args.tune is None else encode(tokenizer, read_text(args.tune))
    model = AutoModelForCausalLM.from_pretrained(args.model, dtype="float32").eval()
    model, source = model.to(args.device), open_checkpoint(args.model)
    rows, failed = calibrated.kept_rows(args), []
    for row in calibrated.to_run(args, rows, begin):
        try:
            found = measure(args, model, row, source, texts)
            if ids is not None:
                start = time.perf_counter()
                found["after"] = calibrated.tuned(args, model, found, texts, ids)
                found["tune_s"] = time.perf_counter() - start
            found.pop("starts")
        except (RuntimeError, ValueError) as error:  # the other rows are worth having
            failed.append(row)
            print(f"{row}: {type(error).__name__}: {error}", flush=True)
            continue
        rows.append(found)
        calibrated.keep_row(args, found)
    calibrated.show(rows, calibrated.about(args))
    if failed:
        raise SystemExit(f"failed: {', '.join(failed)}")


if __name__ == "__main__":
    main()
