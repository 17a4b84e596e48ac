"""Calibrated methods before (and, with --tune, after) a short tuning: output error, perplexity.

    python benchmarks/quality/calibrated.py MODEL_FOLDER --data wiki.test.raw.gz
        --calibrate c4_sample.jsonl.gz [--choose wiki.valid.raw.gz] [--gsm8k test.jsonl]
        [--tune wiki.valid.raw.gz --seeds 3 [--tuned fast:int2-g64-dq:64 ...]]
        [--rows qera-exact:int2-g64-dq:64 fast:int2-g64-dq:64:iters=8 lora:-:64 ...]
        [--device cuda] [--out rows.jsonl]

A row is METHOD:FORMAT:RANK[:KEY=VALUE...], keys of the configuration or choices of the method's row
(blend=1.0, rounding="gptq"); `lora:-:RANK` is the 16-bit model under a fresh LoRA.
All rows share the model, the statistics and the process. Perplexity by protocol `gptq` (joined
text, windows of 2048 without overlap), float32, on up to four texts: --data; what --calibrate holds
beyond the tokens that were calibrated on (`c4`); --choose (`valid`), which with the former is what
a choice between rows may look at; questions and answers of --gsm8k. Tuning (tuning.py) is the same
for all; with several seeds, each of its own windows and fresh factors, the median is shown. Needs
torch, transformers and safetensors, not peft. With --out the rows that are there already are not
run again. A row that fails is reported, and the rest go on.
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import statistics
import subprocess
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import fields
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging
from tuning import Start, fresh, replaced, tune

from loftq.calibration import StatisticsStore, TokenWindows, read_documents
from loftq.checkpoint import open_checkpoint
from loftq.eval import encode, perplexity, read_text
from loftq.integrations import calibrate, discover
from loftq.integrations.blocks import LoadedBlocks
from loftq.methods import METHODS, Method
from loftq.pipeline.config import QuantizeConfig
from loftq.pipeline.plan import Plan, make_plan
from loftq.pipeline.stream import oriented, solved_batches

ROWS = tuple(
    f"{method}:{'nf2-g64-f32' if method == 'loftq-paper' else 'int2-g64-dq'}:{rank}"
    for rank in (64, 16)
    for method in ("loftq-paper", "loftq", "qera-approx", "qera-exact", "cloq", "fast")
)
CHOICES = {field.name for field in fields(Method)} - {
    field.name for field in fields(QuantizeConfig)
}
SOLVED = (("s", "solve_s"),)  # a column of seconds: head, key
Score = Callable[[nn.Module], dict[str, float]]
OTHERS = 64  # windows of the texts besides --data


def solve(
    plan: Plan, source: Any, windows: Any, model: nn.Module
) -> Iterator[tuple[str, Start, dict]]:
    """(module, what is stored, record) of every layer, decoded from the packed form."""
    with ExitStack() as stack:
        known = None
        if plan.calibration is not None:
            known = calibrate.open_statistics(
                plan, windows, lambda: LoadedBlocks(model), recall=nothing,
                open_whole=lambda: model,
            )  # fmt: skip
            stack.callback(known.close)
        for done in solved_batches(plan, plan.batches, source, known):
            for i, layer in enumerate(done.batch.layers):
                Q = done.solution.quantized[i].dequantize()
                start = Start(Q, done.solution.lora_A[i], done.solution.lora_B[i])
                yield layer.info.module, start, done.solution.records[i].to_dict()


def nothing(layer: str) -> None:
    """No layer was solved by an earlier run."""


def applied(
    model: nn.Module, plan: Plan, starts: dict[str, Start], known: StatisticsStore
) -> tuple[nn.Module, float]:
    """A dense copy of the model with the starts in place, and the layers' mean output error."""
    effective, errors = copy.deepcopy(model), []
    for layer in plan.layers:
        start, path = starts[layer.info.module], layer.info.module
        weight = effective.get_parameter(f"{path}.weight").data
        now = oriented(start.Q + start.B @ start.A, layer.info)
        errors.append(output_error(weight, now, known.read(path, "gram").gram))
        weight.copy_(now)
    return effective, sum(errors) / len(errors)


def planned(
    args: argparse.Namespace, source: Any, row: str, instead: str | None = None
) -> tuple[Plan, Any]:
    """Plan of a row, or of another method in its place, and its calibration tokens."""
    method, name, rank, *more = row.split(":")
    extra = {key: json.loads(value) for key, value in (pair.split("=") for pair in more)}
    chosen = {key: extra.pop(key) for key in list(extra) if key in CHOICES}
    if instead is not None:
        method = instead
    elif chosen:
        name_of = f"{method}:{chosen}"
        METHODS[name_of] = METHODS[method].with_options(name=name_of, **chosen)
        method = name_of
    config = QuantizeConfig.from_dict(
        {
            "method": method,
            "format": name,
            "rank": int(rank),
            "data": str(args.calibrate),
            "calibration_windows": args.calibration_windows,
            "calibration_context": args.calibration_context,
            "statistics": args.statistics,
            **extra,
        }
    )
    shapes = {name: entry.shape for name, entry in source.tensors.items()}
    targets = list(config.targets) or None
    layout = discover.describe_folder(args.model, shapes, targets=targets)
    windows = calibration_windows(
        args.model, args.calibrate, args.calibration_windows, args.calibration_context
    )
    known = calibrate.planned(config, windows, source.fingerprint(), args.device)
    return make_plan(config, layout, source, device=args.device, calibration=known), windows


@cache
def calibration_windows(model: Path, text: Path, windows: int, context: int) -> TokenWindows:
    """The calibration tokens, the same for every row that reads any; tokenized once."""
    config = QuantizeConfig(
        method="cloq", data=str(text), calibration_windows=windows, calibration_context=context
    )
    shapes = {name: entry.shape for name, entry in open_checkpoint(model).tensors.items()}
    layout = discover.describe_folder(model, shapes)
    tokenizer = AutoTokenizer.from_pretrained(model)
    found = calibrate.read_windows(config, layout, tokenizer, discover.load_config(model))
    assert found is not None
    return found


def scored(args: argparse.Namespace, model: nn.Module, texts: dict) -> dict[str, float]:
    """Perplexity on each text."""
    found = {}
    for name, ids in texts.items():
        most = min(args.windows or OTHERS, args.other_windows)
        if name == "wiki":
            most = args.windows
        result = perplexity(model, ids, context=2048, windows=most, batch=args.batch)
        found[name] = result.perplexity
    return found


def measure(
    args: argparse.Namespace, model: nn.Module, source: Any, row: str, score: Score
) -> dict[str, Any]:
    """All numbers of one row but those after tuning, and its starts."""
    if row.startswith("lora:"):
        size = 2 * sum(math.prod(entry.shape) for entry in source.tensors.values())
        about = {"row": row, "bits": 16.0, "total_bytes": size, "output_error": 0.0, "solve_s": 0.0}
        return about | {"before": score(model)}
    plan, windows = planned(args, source, row)
    # Of every layer for every row, so that the output error of data-free methods is known too.
    begin = time.perf_counter()
    known = calibrate.take_statistics(
        *planned(args, source, row, "cloq"), lambda: LoadedBlocks(model)
    )
    taken = time.perf_counter()
    starts, records = {}, []
    for path, start, record in solve(plan, source, windows, model):
        starts[path] = start
        records.append(record)
    solved = time.perf_counter()
    effective, mean = applied(model, plan, starts, known)
    return {
        "row": row,
        "bits": plan.bits_per_weight,
        "total_bytes": plan.packed_bytes + plan.copied_bytes + plan.adapter_bytes,
        "error": sum(record["error"] for record in records) / len(records),
        "output_error": mean,
        "calibrate_s": taken - begin,
        "solve_s": solved - taken,
        "notes": sum(bool(record["notes"]) for record in records),
        "before": score(effective),
        "starts": starts,
    }


def tuned(
    args: argparse.Namespace, model: nn.Module, found: dict, texts: dict, ids: Tensor
) -> list[dict[str, float]]:
    """Perplexities after tuning, a dict per seed."""
    rank, after = int(found["row"].split(":")[2]), []
    for seed in range(1, args.seeds + 1):
        starts = found.get("starts") or fresh(model, rank, seed)
        adapted = replaced(model, starts)
        tune(adapted.train(), ids, seed)
        after.append(scored(args, adapted.eval(), texts))
    return after


def output_error(W: Tensor, now: Tensor, gram: Tensor) -> float:
    """||(W - now) R||_F / ||W R||_F with R R^T the Gram of the calibration tokens."""
    gram = gram.to(W.device, torch.float64)
    left, whole = (((E @ gram) * E).sum().item() for E in ((W - now).double(), W.double()))
    return math.sqrt(left / whole)


def to_run(args: argparse.Namespace, rows: list[dict], begin: float) -> Iterator[str]:
    """The rows that are not there yet, as long as --seconds from `begin` are not over."""
    for row in args.rows:
        if row in {known["row"] for known in rows}:
            continue
        if time.perf_counter() - begin > args.seconds:
            print(f"{row}: no time left")
            continue
        yield row


def show(rows: list[dict], about: str, seconds: tuple[tuple[str, str], ...] = SOLVED) -> None:
    """A markdown table: each text before and after tuning, medians and ranges over seeds.

    Args:
        rows: of `measure`.
        about: a line above the table.
        seconds: head and key of each column of seconds.
    """
    texts = list(rows[0]["before"]) if rows else []
    names = [head for head, _ in seconds]
    names += [f"{text} {when}" for when in ("before", "after") for text in texts]
    print(about)
    print(f"| row | bits | MB in all | output error | {' | '.join(names)} |")
    print("|---|" + "--:|" * (3 + len(names)))
    for r in rows:
        cells = [f"{r[key]:.1f}" for _, key in seconds]
        cells += [f"{r['before'][text]:.2f}" for text in texts]
        cells += [spread([one[text] for one in r.get("after", [])]) for text in texts]
        print(
            f"| {r['row']} | {r['bits']:.3f} | {r['total_bytes'] / 1e6:.1f} | "
            f"{r['output_error']:.4f} | {' | '.join(cells)} |",
            flush=True,
        )


def spread(values: list[float]) -> str:
    """Median, and the range where there are several."""
    if not values:
        return "-"
    middle = f"{statistics.median(values):.2f}"
    return middle if len(values) == 1 else f"{middle} ({min(values):.2f}-{max(values):.2f})"


def arguments(doc: str) -> argparse.ArgumentParser:
    """What every script that scores and tunes as this one does is told; `doc` is its docstring."""
    parser = argparse.ArgumentParser(description=doc.split("\n")[0])
    add_arguments(parser)
    parser.add_argument("--out", type=Path, help="JSON lines, continued where it ended")
    return parser


def add_arguments(parser: argparse.ArgumentParser, *, language: bool = True) -> None:
    """Model, texts, calibration and tuning; `language`: nothing but language models is scored."""
    parser.add_argument("model", type=Path)
    parser.add_argument("--data", type=Path, required=language, help="test text")
    parser.add_argument("--calibrate", type=Path, required=True, help="calibration text")
    parser.add_argument("--choose", type=Path, help="text to choose between rows by")
    parser.add_argument("--gsm8k", type=Path, help="questions and answers, .jsonl")
    parser.add_argument("--tune", type=Path, help="text to tune on; leave out for no tuning")
    parser.add_argument("--seeds", type=int, default=1, help="tunings of each row")
    parser.add_argument("--seconds", type=float, default=math.inf, help="start nothing after these")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--windows", type=int, help="test windows; default all")
    parser.add_argument("--other-windows", type=int, default=OTHERS, help="at most, other texts")
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--calibration-windows", type=int, default=128)
    parser.add_argument("--calibration-context", type=int, default=1024, help="tokens of a window")
    parser.add_argument("--statistics", help="folder of statistics; default the user's cache")


def kept_rows(args: argparse.Namespace) -> list[dict]:
    """Rows that --out holds from an earlier run."""
    if args.out is None or not args.out.exists():
        return []
    return [json.loads(line) for line in args.out.read_text().splitlines()]


def keep_row(args: argparse.Namespace, row: dict) -> None:
    """Print a row, and add it to --out."""
    print(json.dumps(row), flush=True)
    if args.out is not None:
        with args.out.open("a") as file:
            file.write(json.dumps(row) + "\n")


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--tuned", nargs="+", help="rows to tune; default all")
    parser.add_argument("--rows", nargs="+", default=ROWS)
    args = parser.parse_args()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    tokenizer, begin = AutoTokenizer.from_pretrained(args.model), time.perf_counter()
    texts = read_texts(args, tokenizer)
    ids = None if args.tune is None else encode(tokenizer, read_text(args.tune))
    model = AutoModelForCausalLM.from_pretrained(args.model, dtype="float32").eval()
    model, source = model.to(args.device), open_checkpoint(args.model)
    rows, failed = kept_rows(args), []
    print(f"reference {scored(args, model, texts)}", flush=True)
    for row in to_run(args, rows, begin):
        if args.device.startswith("cuda"):  # streams and threads of a row keep memory of their own
            torch.cuda.empty_cache()
        try:
            found = measure(args, model, source, row, partial(scored, args, texts=texts))
        except (ValueError, RuntimeError):  # out of memory is one of the latter
            failed.append(row)
            traceback.print_exc()
            continue
        if ids is not None and row in (args.tuned or args.rows):
            start = time.perf_counter()
            found["after"] = tuned(args, model, found, texts, ids)
            found["tune_s"] = time.perf_counter() - start
        found.pop("starts", None)
        rows.append(found)
        keep_row(args, found)
    show(rows, about(args))
    if failed:
        raise SystemExit(f"failed: {', '.join(failed)}")


def read_texts(args: argparse.Namespace, tokenizer: Any) -> dict[str, Tensor]:
    """Token ids of the test texts; of the calibration file, what lies behind its windows."""
    texts = {"wiki": encode(tokenizer, read_text(args.data))}
    c4 = encode(tokenizer, "\n\n".join(read_documents(args.calibrate)))
    if len(rest := c4[args.calibration_windows * args.calibration_context :]) >= 2048:
        texts["c4"] = rest
    if args.choose is not None:
        texts["valid"] = encode(tokenizer, read_text(args.choose))
    if args.gsm8k is not None:
        pairs = map(json.loads, args.gsm8k.read_text().splitlines())
        text = "\n\n".join(f"{pair['question']}\n{pair['answer']}" for pair in pairs)
        texts["gsm8k"] = encode(tokenizer, text)
    return texts


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
