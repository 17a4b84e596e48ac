"""Ways to spend a budget of bits on layers, before (and, with --tune, after) a short tuning.

    python benchmarks/quality/allocation.py MODEL_FOLDER --data wiki.test.raw.gz
        --calibrate c4_sample.jsonl.gz [--choose wiki.valid.raw.gz] [--gsm8k test.jsonl]
        [--tune wiki.valid.raw.gz --seeds 3] [--method qera-exact] [--rank 16]
        [--rows first:2.5 error:2.5 error:2.5:loftq kl:2.5 ...]
        [--device cuda] [--out rows.jsonl]

A row is ALLOCATION:BITS[:METHOD]; METHOD is the one that costs are measured with, all rows are then
solved by --method. So `error:2.5:lq-lora` is LQ-LoRA's integer program, `error:2.5:loftq` the
same without Fisher weights, and `error:2.5` that of output errors. Bits count scales and zeros.
`first` gets the smallest k whose bytes are not below the budget, so it never has fewer bytes than
the others; `uniform:FORMAT` is one format everywhere. Perplexity and tuning are those of
calibrated.py. All rows before any tuning, then the tunings in the order of the rows; --seconds
starts no further step after these, and with --out what is there already is not run again.
"""

from __future__ import annotations

import argparse
import json
import time
from dataclasses import replace
from typing import Any

from calibrated import (
    about,
    applied,
    arguments,
    kept_rows,
    read_texts,
    scored,
    show,
    solve,
    tuned,
)
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging

from loftq.checkpoint import open_checkpoint
from loftq.eval import encode, read_text
from loftq.integrations import allocate, calibrate, discover
from loftq.integrations.blocks import LoadedBlocks
from loftq.pipeline.allocate import sharing_layers
from loftq.pipeline.config import QuantizeConfig
from loftq.pipeline.plan import Plan, make_plan

SECONDS = (("allocate s", "allocate_s"), ("solve s", "solve_s"))
ROWS = tuple(
    f"{allocation}:{bits}{costs}"
    for bits in (2.5, 2.25)
    for allocation, costs in (
        ("first", ""),
        ("kl", ""),
        ("error", ":lq-lora"),
        ("error", ":loftq"),
        ("relative", ""),
        ("error", ""),
    )
)


class Bench:
    """One model, its statistics and its costs; every row is planned and solved on them."""

    def __init__(self, args: argparse.Namespace, model: nn.Module) -> None:
        self.args, self.model, self.source = args, model, open_checkpoint(args.model)
        shapes = {name: entry.shape for name, entry in self.source.tensors.items()}
        self.layout = discover.describe_folder(args.model, shapes)
        self.tokenizer = AutoTokenizer.from_pretrained(args.model)
        self.windows = calibrate.read_windows(
            self.config(method="cloq"), self.layout, self.tokenizer, model.config
        )
        self.measuring = allocate.Measuring(
            open_blocks=lambda: LoadedBlocks(model), open_model=lambda: model
        )

    def config(self, **options: Any) -> QuantizeConfig:
        args = self.args
        shared = {
            "method": args.method,
            "rank": args.rank,
            "data": str(args.calibrate),
            "calibration_windows": args.calibration_windows,
            "calibration_context": args.calibration_context,
            "statistics": args.statistics,
        }
        return QuantizeConfig.from_dict({**shared, **options})

    def plan(self, row: str) -> Plan:
        """The plan of a row, its costs measured with the row's own method."""
        kind, value, *costs = row.split(":")
        if kind == "uniform":
            return self.planned(self.config(format=value))
        if kind == "first":
            return self.first(float(value))
        chosen = {"allocation": kind, "bits": float(value), "candidates": self.args.candidates}
        chosen["allocation_windows"] = self.args.allocation_windows
        config = self.config(costs_by=costs[0] if costs else None, **chosen)
        choice = allocate.allocated(
            config, self.layout, self.source, self.windows, self.args.device, self.measuring
        )
        assert choice is not None
        return self.planned(config, choice)

    def first(self, bits: float) -> Plan:
        """The first k blocks in the widest candidate, k the least that reaches the budget."""
        narrow, *_, wide = self.args.candidates
        for k in range(self.layout.blocks + 1):
            ahead = {x.module: wide for x in sharing_layers(self.config(), self.layout)
                     if x.depth is not None and x.depth < k}  # fmt: skip
            plan = self.planned(self.config(format=narrow, formats=ahead))
            if plan.bits_per_weight >= bits:
                break
        return plan

    def planned(self, config: QuantizeConfig, choice: Any = None) -> Plan:
        fingerprint, device = self.source.fingerprint(), self.args.device
        known = calibrate.planned(config, self.windows, fingerprint, device)
        return make_plan(
            config, self.layout, self.source, device=device, calibration=known, choice=choice
        )

    def before(self, row: str, texts: dict) -> tuple[dict, dict]:
        """Numbers of a row before tuning, and its starts."""
        begin = time.perf_counter()
        plan = self.plan(row)
        chosen = time.perf_counter()
        gram = self.planned(self.config(method="cloq", format="nf4"))  # for the errors of all rows
        known = calibrate.take_statistics(gram, self.windows, self.measuring.open_blocks)
        solving = time.perf_counter()
        layers = solve(plan, self.source, self.windows, self.model)
        starts = {path: start for path, start, _ in layers}
        solved = time.perf_counter()
        effective, mean = applied(self.model, plan, starts, known)
        found = {
            "row": f"{self.args.method}:{row}:{self.args.rank}",
            "bits": plan.bits_per_weight,
            "total_bytes": plan.packed_bytes + plan.copied_bytes + plan.adapter_bytes,
            "output_error": mean,
            "allocate_s": chosen - begin,
            "solve_s": solved - solving,
            "formats": {layer.info.module: str(layer.spec) for layer in plan.layers},
            "before": scored(self.args, effective, texts),
        }
        return found, starts


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--allocation-windows", type=int, default=4)
    parser.add_argument("--method", default="qera-exact")
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument(
        "--candidates", nargs="+", default=["nf2-g64-dq", "nf3-g64-dq", "nf4-g64-dq"],
        help="narrowest first",
    )  # fmt: skip
    parser.add_argument("--rows", nargs="+", default=ROWS)
    args = parser.parse_args()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    begin = time.perf_counter()
    model = AutoModelForCausalLM.from_pretrained(args.model, dtype="float32").eval()
    bench = Bench(args, model.to(args.device))
    texts = read_texts(args, bench.tokenizer)
    done = {row["row"]: row for row in kept_rows(args)}

    def late() -> bool:
        return time.perf_counter() - begin > args.seconds

    def keep(found: dict) -> None:
        done[found["row"]] = found
        said = {key: value for key, value in found.items() if key != "formats"}
        print(f"{time.perf_counter() - begin:.0f} s: {json.dumps(said)}", flush=True)
        if args.out is not None:
            args.out.write_text("".join(json.dumps(row) + "\n" for row in done.values()))

    starts: dict[str, dict] = {}
    for row in args.rows:
        name = f"{args.method}:{row}:{args.rank}"
        wanted = name not in done or (args.tune is not None and "after" not in done[name])
        if not wanted or late():
            continue
        try:
            found, start = bench.before(row, texts)
        except Exception as error:  # one row that fails must not take the others with it
            print(f"{row}: {type(error).__name__}: {error}", flush=True)
            continue
        starts[name] = {path: move(one, "cpu") for path, one in start.items()}
        keep(done.get(name, {}) | found)
    if args.tune is not None:
        ids = encode(bench.tokenizer, read_text(args.tune))
        for name, start in starts.items():
            if late():
                print(f"{name}: no time left to tune")
                continue
            here = {path: move(one, args.device) for path, one in start.items()}
            found = {"row": f"::{args.rank}", "starts": here}
            begun = time.perf_counter()
            after = tuned(args, model, found, texts, ids)
            keep(done[name] | {"after": after, "tune_s": time.perf_counter() - begun})
    show(list(done.values()), about(args), SECONDS)


def move(start: Any, device: str) -> Any:
    """A start on another device."""
    return replace(start, Q=start.Q.to(device), A=start.A.to(device), B=start.B.to(device))


if __name__ == "__main__":
    main()
