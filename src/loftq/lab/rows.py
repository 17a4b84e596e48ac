"""The rows of the demo: what each is, and how it is quantized, tuned and measured."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from loftq.train import Diverged, tune_briefly

if TYPE_CHECKING:
    from peft import PeftModel

    from loftq.pipeline.plan import Plan

RANK = 16
LEARNING_RATE = 2e-3
EVAL_WINDOWS = 2
PROMPT = "When the moon is full,"
NEW_TOKENS = 24

OnStage = Callable[[str], object]


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """One row: its name and how `loftq.quantize` is asked for it."""

    name: str
    """Folder in the work folder, and the row's key in JSON."""
    label: str
    options: Mapping[str, Any] | None
    """Options of `loftq.quantize`; None = the reference, not quantized, with plain LoRA."""


RECIPES = (
    Recipe(name="reference", label="reference", options=None),
    Recipe(name="4bit-loftq", label="4 bits, loftq (default)", options={"bits": 4}),
    # In our format and with our scales, so that it differs from the last row by its start alone.
    Recipe(name="2bit-qlora", label="2 bits, QLoRA", options={"bits": 2, "method": "qlora"}),
    Recipe(
        name="2bit-loftq-paper",
        label="2 bits, LoftQ as published",
        # The paper's exact SVD takes twice as long for an error that is the same to 0.05 %.
        options={"bits": 2, "method": "loftq-paper", "solver": "chebyshev"},
    ),
    Recipe(name="2bit-loftq", label="2 bits, loftq (ours)", options={"bits": 2}),
)


@dataclass(kw_only=True)
class Row:
    """What became of one recipe."""

    name: str
    label: str
    bits_per_weight: float
    """Of the linear layers, scales included, adapters not."""
    model_bytes: int
    """Packed layers and everything that stays 16-bit."""
    adapter_bytes: int
    """The adapter, float32."""
    scale_fit: str | None
    """Rule that chose the scale of each block of weights; None = not quantized."""
    weight_error: float | None
    """Mean relative error of the weights at the start, adapter included; None = not quantized."""
    perplexity_before: float = math.nan
    perplexity_after: float = math.nan
    """NaN when the tuning diverged."""
    sentence: str = ""
    """The prompt and its greedy continuation after tuning, to the end of the sentence."""
    seconds: dict[str, float] = field(default_factory=dict)
    """By stage."""

    @property
    def total_bytes(self) -> int:
        """Everything that has to be stored."""
        return self.model_bytes + self.adapter_bytes

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready: numbers that are not finite become None."""
        values = asdict(self) | {"total_bytes": self.total_bytes}
        for key in ("perplexity_before", "perplexity_after"):
            values[key] = values[key] if math.isfinite(values[key]) else None
        return values


@dataclass(frozen=True, kw_only=True)
class Bench:
    """What all rows share."""

    source: Path
    """Folder of the reference model."""
    work: Path
    """Folder that the quantized models and the tuned adapters go to."""
    tokenizer: Any
    tuning: Tensor
    """(n, context) int64: one window a step, in this order."""
    evaluation: Tensor
    """(n,) int64: the held-out text."""
    context: int
    """Tokens of an evaluation window."""
    steps: int
    device: str


def make_row(recipe: Recipe, bench: Bench, on_stage: OnStage = lambda stage: None) -> Row:
    """Quantize, load, measure, tune, measure, generate, save the tuned adapter."""
    watch = _Watch(on_stage)
    with watch("quantizing"):
        row = _quantized(recipe, bench, on_stage)
    with watch("loading"):
        model = _loaded(recipe, bench)
    with watch("measuring"):
        row.perplexity_before = _perplexity(model, bench)
    with watch("tuning"):
        _unpack_on_cpu(model)
        diverged = _tuned(model, bench, on_stage)
    with watch("measuring again"):
        row.perplexity_after = math.nan if diverged else _perplexity(model, bench)
    with watch("generating"):
        row.sentence = _sentence(model, bench)
    _save(model, bench.work / f"{recipe.name}-adapter")
    row.seconds = watch.seconds
    return row


def _quantized(recipe: Recipe, bench: Bench, on_stage: OnStage) -> Row:
    import loftq

    if recipe.options is None:
        plan = loftq.plan(bench.source, rank=RANK)
        bits = 8 * (plan.source_bytes - plan.copied_bytes) / plan.weights
        return _row(recipe, plan, bits=bits, model_bytes=plan.source_bytes)
    done, total = 0, len(loftq.plan(bench.source, rank=RANK).layers)

    def on_batch(batch: Any, records: list[Mapping[str, Any]], resumed: bool) -> None:
        nonlocal done
        done += len(records)
        on_stage(f"quantizing, {done} of {total} layers")

    result = loftq.quantize(
        bench.source,
        bench.work / recipe.name,
        overwrite=True,
        on_batch=on_batch,
        rank=RANK,
        **recipe.options,
    )
    plan, errors = result.plan, [record["error"] for record in result.records]
    return _row(
        recipe,
        plan,
        bits=plan.bits_per_weight,
        model_bytes=plan.packed_bytes + plan.copied_bytes,
        scale_fit=plan.layers[0].scale_fit,
        weight_error=sum(errors) / len(errors),
    )


def _row(
    recipe: Recipe,
    plan: Plan,
    *,
    bits: float,
    model_bytes: int,
    scale_fit: str | None = None,
    weight_error: float | None = None,
) -> Row:
    return Row(
        name=recipe.name,
        label=recipe.label,
        bits_per_weight=bits,
        model_bytes=model_bytes,
        adapter_bytes=plan.adapter_bytes,
        scale_fit=scale_fit,
        weight_error=weight_error,
    )


def _loaded(recipe: Recipe, bench: Bench) -> PeftModel:
    """The model with a trainable adapter, in float32."""
    import loftq

    if recipe.options is not None:
        folder = bench.work / recipe.name
        return loftq.load(folder, trainable=True, dtype=torch.float32).to(bench.device).eval()
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(bench.source, dtype=torch.float32)
    targets = [layer.info.module for layer in loftq.plan(bench.source, rank=RANK).layers]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        adapted = get_peft_model(
            model,
            LoraConfig(r=RANK, lora_alpha=RANK, target_modules=targets, task_type="CAUSAL_LM"),
        )
    return adapted.to(bench.device).eval()


def _perplexity(model: PeftModel, bench: Bench) -> float:
    from loftq.eval.perplexity import perplexity

    # All windows at once: the packed weights are unpacked for them once.
    return perplexity(
        model, bench.evaluation, context=bench.context, windows=EVAL_WINDOWS, batch=EVAL_WINDOWS
    ).perplexity


def _unpack_on_cpu(model: PeftModel) -> None:
    """Hold the packed values as float32 before tuning on a CPU.

    Unpacking the weights again for each step and each token would take longer than the arithmetic
    with them: there is no fast kernel for CPUs. The values, and so the results, are the same.
    """
    from loftq.nn import dequantize_model_

    if next(model.parameters()).device.type == "cpu":
        dequantize_model_(model, torch.float32)


def _tuned(model: PeftModel, bench: Bench, on_stage: OnStage) -> bool:
    """Tune the adapter in place; True if it diverged."""
    try:
        tune_briefly(
            model,
            bench.tuning.to(bench.device),
            steps=bench.steps,
            learning_rate=LEARNING_RATE,
            on_step=lambda step, loss: on_stage(
                f"tuning, step {step} of {bench.steps}, loss {loss:.2f}"
            ),
        )
    except Diverged:
        return True
    return False


def _sentence(model: PeftModel, bench: Bench) -> str:
    inputs = bench.tokenizer(PROMPT, return_tensors="pt").to(bench.device)
    inputs.pop("token_type_ids", None)
    with torch.no_grad():
        ids = model.generate(
            **inputs,
            max_new_tokens=NEW_TOKENS,
            do_sample=False,
            pad_token_id=bench.tokenizer.pad_token_id or 0,
        )
    text = bench.tokenizer.decode(ids[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    line = " ".join(text.split())
    end = line.find(". ")
    return f"{PROMPT} {line if end < 0 else line[: end + 1]}"


def _save(model: PeftModel, folder: Path) -> None:
    """The tuned adapter, with the mark of the backbone it belongs to."""
    from loftq.integrations.peft import backbone_of, write_lineage

    model.save_pretrained(str(folder))
    backbone = backbone_of(model.get_base_model())
    if backbone is not None:
        write_lineage(folder, backbone)


class _Watch:
    """Seconds of each stage."""

    def __init__(self, on_stage: OnStage) -> None:
        self.on_stage = on_stage
        self.seconds: dict[str, float] = {}

    @contextmanager
    def __call__(self, stage: str) -> Iterator[None]:
        self.on_stage(stage)
        start = time.perf_counter()
        yield
        self.seconds[stage] = time.perf_counter() - start
