"""`loftq lab demo`: one small model, five ways, before and after a few tuning steps, in one table.

It takes the path that a user takes (quantize to disk, load, tune the adapter) and shows what to
expect at 4 and at 2 bits. It is a demonstration on a few pages of text, not a measurement.
"""

from __future__ import annotations

import json
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.console import Console
    from rich.status import Status

    from loftq.lab.rows import Bench, Row

STEPS = 12
TUNING_CONTEXT = 128
EVALUATION_CONTEXT = 512
WORK = "loftq-demo"


@dataclass(frozen=True, kw_only=True)
class DemoResult:
    """The table, and everything that decides its numbers."""

    model: str
    weights: str
    """What the reference's weights are."""
    rows: tuple[Row, ...]
    text: dict[str, Any]
    """Which text, how much of it is tuned on, and what is measured."""
    tuning: dict[str, Any]
    work: str
    """Folder with the quantized models and the tuned adapters."""
    device: str
    threads: int
    seconds: float
    """The whole demo, fetching included."""
    note: str = "A demonstration on a few pages of text: it carries no claim."

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready."""
        return asdict(self) | {"rows": [row.to_dict() for row in self.rows]}


def run_demo(
    *,
    model: str | None = None,
    steps: int = STEPS,
    work: Path | None = None,
    as_json: bool = False,
    console: Console | None = None,
) -> DemoResult:
    """Quantize, tune and compare; says what it does as it goes, then prints the table.

    Args:
        model: folder or hub id of a causal language model; None = the packaged SmolLM2-135M.
        steps: tuning steps of each row, at least 1.
        work: folder for the quantized models and adapters, replaced if they are there; None =
            ./loftq-demo.
        as_json: print one JSON object and nothing else.
        console: where to print; None = standard output.

    Raises:
        ValueError: a download with another hash, a model without a tokenizer or that is not a
            causal language model, and whatever else `loftq.quantize` refuses.
    """
    from rich.console import Console

    from loftq.lab.show import print_result

    if steps < 1:
        raise ValueError(f"steps={steps}: must be at least 1.")
    console = console or Console()
    with _quiet_libraries():
        result = _run(model, steps, Path(work or WORK), Console(quiet=True) if as_json else console)
    if as_json:
        print(json.dumps(result.to_dict(), indent=2, ensure_ascii=False), file=console.file)
    else:
        print_result(result, console)
    return result


def _run(model: str | None, steps: int, work: Path, console: Console) -> DemoResult:
    import torch

    from loftq.lab import rows

    start = time.perf_counter()
    with console.status("model"):
        source, weights = _source(model, console)
        bench = _bench(source, work, steps)
    console.print(f"[{time.perf_counter() - start:4.0f} s] model in {source}", **PLAIN)
    made = []
    for number, recipe in enumerate(rows.RECIPES, 1):
        place = f"{number} of {len(rows.RECIPES)}: {recipe.label}"
        if not console.is_terminal:
            console.print(f"         {place} ...", **PLAIN)
        with console.status(place) as status:
            row = rows.make_row(recipe, bench, partial(_show_stage, status, place))
        made.append(row)
        console.print(f"[{time.perf_counter() - start:4.0f} s] {place}: {_summary(row)}", **PLAIN)
    return DemoResult(
        model=_name(model),
        weights=weights,
        rows=tuple(made),
        text=_text(bench),
        tuning={
            "steps": steps,
            "tokens_per_step": bench.tuning.shape[1] - 1,
            "rank": rows.RANK,
            "learning_rate": rows.LEARNING_RATE,
            "optimizer": "AdamW on the adapters, float32",
        },
        work=str(work),
        device=bench.device,
        threads=torch.get_num_threads(),
        seconds=time.perf_counter() - start,
    )


def _show_stage(status: Status, place: str, stage: str) -> None:
    status.update(f"{place}: {stage}")


PLAIN: dict[str, Any] = {"markup": False, "highlight": False, "soft_wrap": True}


def _source(model: str | None, console: Console) -> tuple[Path, str]:
    """The reference model's folder, and what its weights are."""
    if model is not None:
        from loftq.integrations.discover import resolve_source

        return Path(resolve_source(model)), "as given"
    from loftq.lab.models import SMOLLM2, demo_model

    folder = demo_model(say=lambda line: console.print(f"         {line}", **PLAIN))
    return folder, SMOLLM2.precision


def _name(model: str | None) -> str:
    from loftq.lab.models import SMOLLM2

    return model or SMOLLM2.origin


def _bench(source: Path, work: Path, steps: int) -> Bench:
    """Check that the model can take part, and cut the text into this tokenizer's windows."""
    import torch
    from transformers import AutoTokenizer

    import loftq
    from loftq.eval.text import encode
    from loftq.lab.rows import RANK, Bench
    from loftq.lab.text import demo_text, windows

    planned = loftq.plan(source, rank=RANK)
    if planned.layout.task_type != "CAUSAL_LM":
        raise ValueError(
            f"{source}: {planned.layout.architecture} is not a causal language model, so it has no "
            "perplexity. Choose another --model; `loftq quantize` itself takes this one."
        )
    try:
        tokenizer = AutoTokenizer.from_pretrained(source)
    except (OSError, ValueError) as error:
        raise ValueError(
            f"{source}: no tokenizer could be loaded ({error}). Put its files beside the weights."
        ) from error
    training, evaluation = demo_text()
    return Bench(
        source=source,
        work=work,
        tokenizer=tokenizer,
        tuning=windows(encode(tokenizer, training), TUNING_CONTEXT + 1),
        evaluation=encode(tokenizer, evaluation),
        context=EVALUATION_CONTEXT,
        steps=steps,
        device="cuda" if torch.cuda.is_available() else "cpu",
    )


def _text(bench: Bench) -> dict[str, Any]:
    from loftq.lab.rows import EVAL_WINDOWS, PROMPT

    seen = min(bench.steps, len(bench.tuning))
    return {
        "name": "loftq/lab/demo_text.txt: short essays written for this project",
        "tokens_tuned_on": seen * (bench.tuning.shape[1] - 1),
        "evaluation": "four other essays of the same file",
        "windows": EVAL_WINDOWS,
        "context": bench.context,
        "prompt": PROMPT,
    }


def _summary(row: Row) -> str:
    from loftq.lab.show import perplexity_text

    before, after = perplexity_text(row.perplexity_before), perplexity_text(row.perplexity_after)
    spent = ", ".join(f"{stage} {s:.0f} s" for stage, s in row.seconds.items() if s >= 0.5)
    return f"perplexity {before} -> {after}" + (f" ({spent})" if spent else "")


@contextmanager
def _quiet_libraries() -> Iterator[None]:
    """Without transformers' bars and remarks, which would break up the demo's own lines."""
    from transformers.utils import logging

    bars, verbosity = logging.is_progress_bar_enabled(), logging.get_verbosity()
    logging.disable_progress_bar()
    logging.set_verbosity_error()
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", module=r"(peft|transformers)(\..*)?$")
            yield
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()
