"""The part of `plan` that a budget adds: what was chosen, the training peak by part, the time."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from loftq.cli import console

if TYPE_CHECKING:
    from rich.console import Console

    from loftq.train.memory import Fit

FIXABLE = ("bits", "rank", "embedding", "head")
MOMENTS = {
    "loss": "in the loss",
    "backward of the loss": "in the backward of the loss",
    "last block": "as the backward begins",
    "first block": "as the backward ends",
    "optimizer": "in the optimizer's step",
}


@dataclass(frozen=True)
class Training:
    """A fit, and the tokens of the data if there are any."""

    fit: Fit
    tokens: int | None

    @property
    def options(self) -> dict[str, Any]:
        """Options of `quantize` that were chosen."""
        return {key: value for key, value in self.fit.options.items() if key in FIXABLE}

    @property
    def hours(self) -> float | None:
        """Hours for one pass over the data."""
        return None if self.tokens is None else self.fit.pace.hours(self.tokens)

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready."""
        return {
            **self.fit.to_dict(),
            "tokens_per_step": self.fit.settings.tokens * self.fit.settings.accumulation,
            "tokens_per_epoch": self.tokens,
            "hours_per_epoch": self.hours,
        }


def within(model: str, memory: str, data: str | None, options: Mapping[str, Any]) -> Training:
    """Choose what fits `memory`; what the user has set stays.

    Args:
        model: full-precision model.
        memory: size of the card, such as 8GB.
        data: training data; None = rows of any length.
        options: of the quantization, only those that were given.

    Raises:
        ValueError: not a size, nothing fits, or a method that calibrates: data is training data.
    """
    from loftq.train.base import require_calibration
    from loftq.train.memory import TrainingSettings, configurable, context_limit, fit, parse_size

    require_calibration(options)
    budget = parse_size(memory)
    fixed = {key: options[key] for key in FIXABLE if key in options}
    if "format" in options or "engine" in options:
        fixed["bits"] = None  # the format is settled
    rest = {k: v for k, v in options.items() if k not in (*FIXABLE, "device", "max_shard_bytes")}
    cpu = str(options.get("device", "cuda")).startswith("cpu")
    settings = TrainingSettings(device="cpu", dtype="fp32") if cpu else TrainingSettings()
    longest, tokens = (None, None) if data is None else _data(model, data)
    found = fit(
        configurable(model, rest),
        budget,
        longest=longest,
        limit=context_limit(model),
        fixed=fixed,
        settings=settings,
    )
    return Training(found, tokens)


def show(out: Console, training: Training) -> None:
    """For people: choices with reasons, bytes by part, time."""
    fit, peak = training.fit, training.fit.peak
    out.print(f"\ntraining within {console.size(fit.budget)}")
    lines = console.facts()
    for choice in fit.choices:
        lines.add_row(choice.name, choice.value, choice.reason)
    out.print(lines)
    out.print()
    parts = console.table("part", "bytes", right=("bytes",))
    for name, size in peak.parts.items():
        parts.add_row(name, console.size(size))
    parts.add_row("peak", console.size(peak.total))
    out.print(parts)
    left = console.facts()
    context = (
        "" if fit.settings.device == "cpu" else "; the CUDA context and the allocator's reserve"
    )
    left.add_row("peak", MOMENTS[peak.moment], f"predicted, of {console.size(fit.usable)} that "
                 f"tensors may take{context and context + ' are set aside'}")  # fmt: skip
    if peak.host:
        left.add_row("host", console.size(peak.host), "the embedding, in host memory")
    tokens = fit.settings.tokens * fit.settings.accumulation
    left.add_row("step", f"{tokens:,} tokens", "at most, padding included")
    if training.hours is not None and training.tokens is not None:
        seconds = training.hours * 3600
        left.add_row(
            "epoch", console.duration(seconds), f"{training.tokens:,} tokens; an estimate: "
            f"{fit.pace.basis}",
        )  # fmt: skip
    out.print(left)


def _data(model: str, data: str) -> tuple[int, int]:
    """Tokens of the longest row of the data, and of all rows."""
    from transformers import AutoTokenizer

    from loftq.integrations.discover import resolve_source
    from loftq.train.data import DataSettings, prepare
    from loftq.train.memory import context_limit

    tokenizer = AutoTokenizer.from_pretrained(resolve_source(model))
    prepared = prepare(data, tokenizer, DataSettings(), model_context=context_limit(model))
    lengths = [len(ids) for ids in prepared.train["input_ids"]]
    return max(lengths), sum(lengths)
