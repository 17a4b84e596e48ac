"""Calibrated methods before (and, with --tune, after) a short tuning: output error, perplexity.

    python benchmarks/quality/calibrated.py MODEL_FOLDER --data wiki.test.raw.gz
        --calibrate c4_sample.jsonl.gz [--tune wiki.valid.raw.gz] [--device cuda]
        [--rows qera-exact:int2-g64-dq:64 fast:int2-g64-dq:64:iters=8 ...] [--out rows.jsonl]

A row is METHOD:FORMAT:RANK[:KEY=VALUE...]. All rows share the model, the statistics and the
process. Perplexity by protocol `gptq` (joined text, windows of 2048 without overlap), float32.
Tuning, as in every row: 150 AdamW steps of 8 x 1024 tokens, 3e-4, cosine after 10 steps of warm-up,
bfloat16 autocast on a GPU. Needs torch, transformers and safetensors, not peft. With --out the rows
that are there already are not run again.
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import subprocess
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging

from loftq.checkpoint import open_checkpoint
from loftq.eval import encode, perplexity, read_text
from loftq.integrations import calibrate, discover
from loftq.integrations.blocks import LoadedBlocks
from loftq.pipeline.config import QuantizeConfig
from loftq.pipeline.plan import Plan, make_plan
from loftq.pipeline.stream import oriented, solved_batches

ROWS = tuple(
    f"{method}:{'nf2-g64-f32' if method == 'loftq-paper' else 'int2-g64-dq'}:{rank}"
    for rank in (64, 16)
    for method in ("loftq-paper", "loftq", "qera-approx", "qera-exact", "cloq", "fast")
)
STEPS, BATCH, LENGTH, RATE = 150, 8, 1024, 3e-4


@dataclass
class Start:
    """One layer as it is before tuning."""

    Q: Tensor
    A: Tensor
    B: Tensor


class Lora(nn.Module):
    """y = x (Q + B A)^T with trainable A and B; alpha = rank."""

    def __init__(self, start: Start) -> None:
        super().__init__()
        self.register_buffer("Q", start.Q)
        self.A, self.B = nn.Parameter(start.A.clone()), nn.Parameter(start.B.clone())

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.Q.to(x.dtype)) + F.linear(F.linear(x, self.A), self.B)


def solve(plan: Plan, source: Any, statistics: Any) -> Iterator[tuple[str, Start, dict]]:
    """(module, what is stored, record) of every layer, decoded from the packed form."""
    for done in solved_batches(plan, plan.batches, source, statistics):
        for i, layer in enumerate(done.batch.layers):
            Q = done.solution.quantized[i].dequantize()
            start = Start(Q, done.solution.lora_A[i], done.solution.lora_B[i])
            yield layer.info.module, start, done.solution.records[i].to_dict()


def replaced(model: nn.Module, starts: dict[str, Start]) -> nn.Module:
    """A copy with frozen Q and trainable adapters."""
    model = copy.deepcopy(model).requires_grad_(False)
    for path, start in starts.items():
        parent, _, name = path.rpartition(".")
        setattr(model.get_submodule(parent), name, Lora(start))
    return model


def tune(model: nn.Module, ids: Tensor) -> None:
    """The tuning that every row gets; windows from a generator of its own."""
    generator = torch.Generator().manual_seed(1)
    adapter = [p for p in model.parameters() if p.requires_grad]
    optimizer, device = torch.optim.AdamW(adapter, lr=RATE, weight_decay=0.0), adapter[0].device
    for step in range(STEPS):
        rate = RATE * min(1, (step + 1) / 10) * 0.5 * (1 + math.cos(math.pi * step / STEPS))
        for group in optimizer.param_groups:
            group["lr"] = rate
        starts = torch.randint(0, len(ids) - LENGTH - 1, (BATCH,), generator=generator)
        windows = torch.stack([ids[s : s + LENGTH] for s in starts.tolist()]).to(device)
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
            logits = model(input_ids=windows, use_cache=False).logits[:, :-1]
        loss = F.cross_entropy(logits.flatten(0, 1).float(), windows[:, 1:].flatten())
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(adapter, 1.0)
        optimizer.step()


def planned(args: argparse.Namespace, source: Any, row: str) -> tuple[Plan, Any]:
    """Plan of a row, and its calibration tokens."""
    method, name, rank, *more = row.split(":")
    extra = {key: json.loads(value) for key, value in (pair.split("=") for pair in more)}
    config = QuantizeConfig.from_dict(
        {
            "method": method,
            "format": name,
            "rank": int(rank),
            "data": str(args.calibrate),
            "calibration_windows": args.calibration_windows,
            "statistics": args.statistics,
            **extra,
        }
    )
    shapes = {name: entry.shape for name, entry in source.tensors.items()}
    targets = list(config.targets) or None
    layout = discover.describe_folder(args.model, shapes, targets=targets)
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    windows = calibrate.read_windows(config, layout, tokenizer, discover.load_config(args.model))
    known = calibrate.planned(config, windows, source.fingerprint(), args.device)
    return make_plan(config, layout, source, device=args.device, calibration=known), windows


def scored(args: argparse.Namespace, model: nn.Module, ids: Tensor) -> float:
    found = perplexity(model, ids, context=2048, windows=args.windows, batch=args.batch)
    return found.perplexity


def measure(args: argparse.Namespace, model: nn.Module, source: Any, row: str, texts: dict) -> dict:
    """All numbers of one row."""
    plan, _ = planned(args, source, row)
    # Of every layer for every row, so that the output error of data-free methods is known too.
    begin = time.perf_counter()
    statistics = calibrate.take_statistics(
        *planned(args, source, "cloq:" + row.partition(":")[2]), lambda: LoadedBlocks(model)
    )
    taken = time.perf_counter()
    starts, records = {}, []
    for path, start, record in solve(plan, source, statistics):
        starts[path] = start
        records.append(record)
    solved = time.perf_counter()
    effective, errors = copy.deepcopy(model), []
    for layer in plan.layers:
        start = starts[layer.info.module]
        weight = effective.get_parameter(f"{layer.info.module}.weight").data
        now = oriented(start.Q + start.B @ start.A, layer.info)
        errors.append(output_error(weight, now, statistics.read(layer.info.module, "gram").gram))
        weight.copy_(now)
    found = {
        "row": row,
        "bits": plan.bits_per_weight,
        "total_bytes": plan.packed_bytes + plan.copied_bytes + plan.adapter_bytes,
        "error": sum(record["error"] for record in records) / len(records),
        "output_error": sum(errors) / len(errors),
        "calibrate_s": taken - begin,
        "solve_s": solved - taken,
        "notes": sum(bool(record["notes"]) for record in records),
        "before": scored(args, effective, texts["test"]),
    }
    del effective
    if args.tune is not None:
        adapted = replaced(model, starts)
        tune(adapted.train(), texts["tune"])
        found["after"] = scored(args, adapted.eval(), texts["test"])
    return found


def output_error(W: Tensor, now: Tensor, gram: Tensor) -> float:
    """||(W - now) R||_F / ||W R||_F with R R^T the Gram of the calibration tokens."""
    gram = gram.to(W.device, torch.float64)
    left, whole = (((E @ gram) * E).sum().item() for E in ((W - now).double(), W.double()))
    return math.sqrt(left / whole)


def show(rows: list[dict], about: str) -> None:
    print(about)
    print("| row | bits | MB in all | weight error | output error | s | before | after |")
    print("|---|--:|--:|--:|--:|--:|--:|--:|")
    for r in rows:
        after = f"{r['after']:.2f}" if "after" in r else "-"
        print(
            f"| {r['row']} | {r['bits']:.3f} | {r['total_bytes'] / 1e6:.1f} | {r['error']:.4f} | "
            f"{r['output_error']:.4f} | {r['solve_s']:.1f} | {r['before']:.2f} | {after} |",
            flush=True,
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("--data", type=Path, required=True, help="test text")
    parser.add_argument("--calibrate", type=Path, required=True, help="calibration text")
    parser.add_argument("--tune", type=Path, help="text to tune on; leave out for no tuning")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--windows", type=int, help="test windows; default all")
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--calibration-windows", type=int, default=128)
    parser.add_argument("--statistics", help="folder of statistics; default the user's cache")
    parser.add_argument("--rows", nargs="+", default=ROWS)
    parser.add_argument("--out", type=Path, help="JSON lines, continued where it ended")
    args = parser.parse_args()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    texts = {"test": encode(tokenizer, read_text(args.data))}
    if args.tune is not None:
        texts["tune"] = encode(tokenizer, read_text(args.tune))
    model = AutoModelForCausalLM.from_pretrained(args.model, dtype="float32").eval()
    model, source = model.to(args.device), open_checkpoint(args.model)
    rows: list[dict] = []
    if args.out is not None and args.out.exists():
        rows = [json.loads(line) for line in args.out.read_text().splitlines()]
    print(f"reference {scored(args, model, texts['test']):.3f}", flush=True)
    for row in args.rows:
        if row in {known["row"] for known in rows}:
            continue
        rows.append(measure(args, model, source, row, texts))
        print(json.dumps(rows[-1]), flush=True)
        if args.out is not None:
            with args.out.open("a") as file:
                file.write(json.dumps(rows[-1]) + "\n")
    show(rows, about(args))


def about(args: argparse.Namespace) -> str:
    cuda = args.device.startswith("cuda")
    where = torch.cuda.get_device_name(args.device) if cuda else args.device
    run = ["git", "rev-parse", "--short", "HEAD"]
    commit = subprocess.run(run, capture_output=True, text=True).stdout.strip() or "unknown"
    windows = args.windows or "all"
    return (
        f"{args.model.name} on {where}, torch {torch.__version__}, commit {commit}; test windows: "
        f"{windows}; calibration: {args.calibration_windows} windows of {args.calibrate.name}"
    )


if __name__ == "__main__":
    main()
