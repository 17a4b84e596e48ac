"""All methods side by side, shared by many processes: before and, for chosen rows, after tuning.

    python benchmarks/quality/all_methods.py FOLDER MODEL --calibrate c4_sample.jsonl.gz
        --data wiki.test.raw.gz [--gsm8k test.jsonl] [--choose wiki.valid.raw.gz]
        [--methods qlora ... best] [--formats int2-g64-dq ...] [--ranks 16 64] [--rows ROW ...]
        [--tune wiki.valid.raw.gz --seeds 3 --tuned ROW ...] [--processes 5] [--device cuda]
    python benchmarks/quality/all_methods.py FOLDER MODEL --calibrate wikipedia_sample.jsonl.gz
        --pairs stsb/validation.jsonl.gz ...
    python benchmarks/quality/all_methods.py FOLDER MODEL ... --table

Rows are those of calibrated.py, METHOD:FORMAT:RANK[:KEY=VALUE...], by default all --methods in all
--formats and --ranks; --rows replaces them. A start that gradients refine (`max`, or a method with
refinement=distill) goes the way of refined.py, whose epochs=, rate= and so on it may have too.
Statistics are taken once, a start is solved once and tuned with every seed. Any number of processes
may work on one FOLDER, on several GPUs too, and the same command goes on after a stop (--seconds).
Every row says commit, GPU and versions. With --pairs the model is an encoder: Spearman correlation
on STS-B without any training, and by how much its sentence embeddings have moved.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import calibrated
import refined
import torch
import transformers
from encoders import Pairs
from methods_table import show
from safetensors.torch import load_file, save_file
from sharing import Job, Rows, launch, share
from torch import Tensor, nn
from transformers import AutoTokenizer
from transformers.utils import logging
from tuning import Start, fresh, replaced, tune

from loftq.checkpoint import open_checkpoint
from loftq.eval import encode, read_text
from loftq.integrations import calibrate, discover
from loftq.integrations.blocks import LoadedBlocks
from loftq.lab.compare.machine import describe_machine
from loftq.methods import METHODS

DEFAULT = (
    "qlora", "loftq-paper", "loftq", "lqer", "qera-approx", "qera-exact", "eora", "quailora",
    "cloq", "projq", "srr", "corda", "fast", "best",
)  # fmt: skip
FORMATS = ("int2-g64-dq", "int3-g64-dq", "nf4-g64-dq")
REFERENCE, STATISTICS = "reference", "statistics"
SETTINGS = (
    "model", "data", "calibrate", "choose", "gsm8k", "tune", "pairs", "windows", "other_windows",
    "calibration_windows", "calibration_context", "refine_text", "refine_windows",
)  # fmt: skip
"""Arguments that decide numbers; rows made with others do not stand side by side."""


@dataclass
class Bench:
    """A model, its texts and what is done to it; everything is loaded when it is first needed."""

    args: argparse.Namespace

    @cached_property
    def model(self) -> nn.Module:
        # Layers are named as in the class that the folder tells of, with its head.
        kind = getattr(transformers, discover.load_config(self.args.model).architectures[0])
        return kind.from_pretrained(self.args.model, dtype="float32").eval().to(self.args.device)

    @cached_property
    def source(self) -> Any:
        return open_checkpoint(self.args.model)

    @cached_property
    def tokenizer(self) -> Any:
        return AutoTokenizer.from_pretrained(self.args.model)

    @cached_property
    def score(self) -> Callable[[nn.Module], dict[str, float]]:
        """What a model is scored by."""
        if self.args.pairs is not None:
            return Pairs(self.args.pairs, self.tokenizer, self.model)
        return partial(self._perplexities, calibrated.read_texts(self.args, self.tokenizer))

    @cached_property
    def tuning_ids(self) -> Tensor:
        return encode(self.tokenizer, read_text(self.args.tune))

    def _perplexities(self, texts: dict[str, Tensor], model: nn.Module) -> dict[str, float]:
        return calibrated.scored(self.args, model, texts)

    def reference(self) -> dict[str, Any]:
        """The original model."""
        return self._told({"before": self.score(self.model)})

    def statistics(self) -> dict[str, Any]:
        """Take the statistics that all rows read."""
        plan, windows = calibrated.planned(self.args, self.source, "cloq:int2-g64-dq:16")
        calibrate.take_statistics(plan, windows, lambda: LoadedBlocks(self.model))
        return self._told({"tokens": windows.tokens})

    def start(self, row: str) -> dict[str, Any]:
        """Solve a row, score it, and keep its start if it is to be tuned."""
        if (refinement := refinement_of(row)) is not None:
            found, starts = refined.refined(self.args, refinement, self.source)
            found |= {"before": self.score(replaced(self.model, starts)), "row": row}
        else:
            found = calibrated.measure(self.args, self.model, self.source, row, self.score)
            starts = found.pop("starts", {})
        if row in self.args.tuned and starts:
            path = self._start_path(row)
            path.parent.mkdir(parents=True, exist_ok=True)
            save_file({f"{k}.{p}": getattr(s, p).contiguous() for k, s in starts.items()
                       for p in "QAB"}, path)  # fmt: skip
        return self._told(found)

    def tuned(self, row: str, seed: int) -> dict[str, Any]:
        """Tune a start and score it again."""
        begin = time.perf_counter()
        adapted = replaced(self.model, self._starts(row, seed))
        tune(adapted.train(), self.tuning_ids, seed)
        tuned = time.perf_counter() - begin
        return self._told({"after": self.score(adapted.eval()), "tune_s": tuned})

    def _starts(self, row: str, seed: int) -> dict[str, Start]:
        if row.startswith("lora:"):
            return fresh(self.model, int(row.split(":")[2]), seed)
        tensors = load_file(self._start_path(row), device=self.args.device)
        paths = {name.rpartition(".")[0] for name in tensors}
        return {path: Start(*(tensors[f"{path}.{p}"] for p in "QAB")) for path in sorted(paths)}

    def _start_path(self, row: str) -> Path:
        return self.args.folder / "starts" / (row.replace(":", "_") + ".safetensors")

    def _told(self, row: dict[str, Any]) -> dict[str, Any]:
        if self.args.device.startswith("cuda"):  # what threads and streams kept is for others
            torch.cuda.empty_cache()
        machine = describe_machine(self.args.device)
        told = {"commit": self.args.commit or machine["commit"] or "unknown"}
        return row | {"machine": machine | told}


def jobs(bench: Bench) -> list[Job]:
    """All jobs of a table, those first that others wait for."""
    args = bench.args
    found = [
        Job(name=STATISTICS, work=bench.statistics),
        Job(name=REFERENCE, work=bench.reference),
    ]
    tuned = [row for row in args.rows if row in args.tuned]
    for row in sorted(args.rows, key=lambda row: row not in tuned):
        after = None if row.startswith("lora:") else STATISTICS
        found.append(Job(name=row, work=partial(bench.start, row), after=after))
    for seed in range(1, args.seeds + 1):
        found += [
            Job(name=tuning(row, seed), work=partial(bench.tuned, row, seed), after=row)
            for row in tuned
        ]
    return found


def tuning(row: str, seed: int) -> str:
    """Name of the job that tunes a row."""
    return f"{row}:tuned-{seed}"


def refinement_of(row: str) -> str | None:
    """The same in the words of refined.py, where gradients work on the start; else None."""
    method, name, rank, *more = row.split(":")
    chosen = dict(pair.split("=") for pair in more)
    asked = chosen.pop("refinement", None)
    if method.startswith("lora") or (asked is None and not METHODS[method].refined):
        return None
    if other := chosen.keys() - refined.KINDS.keys():
        known = ", ".join(refined.KINDS)
        raise ValueError(
            f"{row}: a refined row takes no {', '.join(sorted(other))}. It takes {known}."
        )
    pairs = [f"{key}={value}" for key, value in chosen.items()]
    return ":".join([method, name, rank, asked or METHODS[method].refinement, *pairs])


def rows_of(args: argparse.Namespace) -> list[str]:
    """All methods in all formats and ranks; LoftQ as published keeps to its own grid."""
    return [
        f"{method}:{name.replace('int', 'nf') if method == 'loftq-paper' else name}:{rank}"
        for rank in args.ranks
        for name in args.formats
        for method in args.methods
    ]


def settings(args: argparse.Namespace) -> dict[str, Any]:
    """What decides the numbers, files by their names."""
    given = {key: getattr(args, key) for key in SETTINGS}
    return {key: x.resolve().name if isinstance(x, Path) else x for key, x in given.items()}


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("folder", type=Path, help="of rows; continued where it ended")
    calibrated.add_arguments(parser, language=False)
    parser.add_argument("--pairs", type=Path, help="STS-B pairs: the model is an encoder")
    parser.add_argument("--methods", nargs="+", default=DEFAULT)
    parser.add_argument("--formats", nargs="+", default=FORMATS)
    parser.add_argument("--ranks", nargs="+", type=int, default=(16, 64))
    parser.add_argument("--rows", nargs="+", help="instead of --methods, --formats and --ranks")
    parser.add_argument("--tuned", nargs="+", help="rows to tune; default all with --tune")
    parser.add_argument("--processes", type=int, default=1, help="on this GPU")
    parser.add_argument("--refine-text", type=Path, help="for max; default --calibrate")
    parser.add_argument("--refine-windows", type=int, default=128, help="of --refine-text")
    parser.add_argument("--commit", help="of the code, where git cannot tell")
    parser.add_argument("--retry", action="store_true", help="do again what failed")
    parser.add_argument("--table", action="store_true", help="show what is there")
    args = parser.parse_args()
    if (args.data is None) == (args.pairs is None):
        parser.error("one of --data (a language model) and --pairs (an encoder) is needed")
    args.rows = args.rows or rows_of(args)
    unknown = {row.split(":")[0] for row in args.rows} - METHODS.keys() - {"lora"}
    if unknown:
        parser.error(f"no method {', '.join(sorted(unknown))}; there are {', '.join(METHODS)}")
    args.tuned = (args.tuned or args.rows) if args.tune is not None else []
    args.statistics = args.statistics or str(args.folder / STATISTICS)
    args.work = args.folder / "packed"
    return args


def main() -> None:
    begin, args = time.perf_counter(), arguments()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    rows, planned = Rows(args.folder), jobs(Bench(args))
    try:
        rows.claim(settings(args))
    except ValueError as error:
        raise SystemExit(f"error: {error}") from error
    if args.retry:
        rows.forget_failures()
    if args.processes > 1 and not args.table:
        same = [word for word in sys.argv if word != "--retry"]  # failures are forgotten once
        launch(args.processes, args.folder, [*same, "--processes", "1"])
    elif not args.table:
        share(rows, planned, late=lambda: time.perf_counter() - begin > args.seconds)
        return
    tunings = {row: [tuning(row, seed) for seed in range(1, args.seeds + 1)] for row in args.rows}
    failed = show(rows, REFERENCE, tunings, shared=STATISTICS)
    if failed:
        raise SystemExit(f"failed: {', '.join(failed)}")


if __name__ == "__main__":
    main()
