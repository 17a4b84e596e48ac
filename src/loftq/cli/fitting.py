"""The part of `plan` that a budget adds: what was chosen, the training peak by part, the time."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from loftq.cli import console

if TYPE_CHECKING:
    from rich.console import Console

    from loftq.train.memory import Fit

ELSEWHERE = ("device", "max_shard_bytes")
"""Options of a quantization that say nothing of the training."""
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


def within(
    model: str, memory: str, data: str | None, options: Mapping[str, Any]
) -> tuple[Training, dict[str, Any]]:
    """Choose what fits `memory`, as `train --memory` does; what the user has set stays.

    Args:
        model: full-precision model.
        memory: size of the card, such as 8GB.
        data: training data; None = rows of any length.
        options: of a training and its quantization (train.options), and device; only those that
            were given.

    Returns:
        The training, and the options of its quantization with what was chosen.

    Raises:
        ValueError: not a size, nothing fits, or a method that calibrates without `calibration`.
    """
    from loftq.integrations.discover import resolve_source
    from loftq.train.base import require_calibration
    from loftq.train.budget import fit_to
    from loftq.train.inputs import read_inputs, token_count
    from loftq.train.options import split_options
    from loftq.train.place import Place

    rest = {key: value for key, value in options.items() if key not in ELSEWHERE}
    device = "cpu" if str(options.get("device", "cuda")).startswith("cpu") else "cuda"
    chosen, folder = split_options(rest), resolve_source(model)
    require_calibration(chosen.quantize)
    rows = None if data is None else read_inputs(folder, data, None, chosen.data, Place("cpu"))
    dtype = chosen.config.dtype
    if dtype == "auto":  # of a card that need not be here
        dtype = "fp32" if device == "cpu" else "bf16"
    fitted, found = fit_to(
        memory, folder, chosen, rows, device=device, dtype=dtype, given=set(rest)
    )
    tokens = None if rows is None else token_count(rows)
    return Training(found, tokens), dict(fitted.quantize)


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
