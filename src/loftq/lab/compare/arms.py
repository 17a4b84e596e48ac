"""What a table compares: a method of quantization or a baseline, with what it changes.

A word names an arm: `loftq`, `loftq-paper:iters=1`, `qlora:scale_fit=absmax`,
`lora16:weight_decay=0.1`. What follows the colons are options of `loftq train`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from difflib import get_close_matches
from typing import Any

import yaml

from loftq.methods import METHODS
from loftq.pipeline.config import QuantizeConfig

QUANTIZATION = frozenset(f.name for f in fields(QuantizeConfig)) - {"seed"}
"""Options that decide the backbone and the start."""


@dataclass(frozen=True, kw_only=True)
class Baseline:
    """A way to train that quantizes nothing."""

    summary: str
    adapts: bool
    """Whether it trains adapters, so that a rank means something."""


BASELINES = {
    "full": Baseline(summary="Full fine-tuning of the original weights.", adapts=False),
    "lora16": Baseline(summary="LoRA on the original weights.", adapts=True),
}


@dataclass(frozen=True, kw_only=True)
class Arm:
    """One line of a comparison, before format, rank and seed."""

    name: str
    """As it was written, options included."""
    method: str
    """Row of the method table, or a baseline."""
    options: Mapping[str, Any] = field(default_factory=dict)

    @property
    def quantizes(self) -> bool:
        """Whether a format means something."""
        return self.method not in BASELINES

    @property
    def adapts(self) -> bool:
        """Whether a rank means something."""
        return self.quantizes or BASELINES[self.method].adapts


def parse_arm(word: str) -> Arm:
    """The arm that a word names.

    Raises:
        ValueError: an unknown method (with the nearest one), or an option that is not key=value.
    """
    method, *pairs = word.strip().split(":")
    known = [*BASELINES, *METHODS]
    if method not in known:
        near = get_close_matches(method, known, n=1, cutoff=0.3)
        hint = f"Did you mean {near[0]}? " if near else ""
        raise ValueError(f"unknown method {method!r}. {hint}Known: {', '.join(known)}.")
    options = dict(_pair(word, pair) for pair in pairs)
    wasted = sorted(set(options) & QUANTIZATION - {"rank", "alpha"}) if method in BASELINES else []
    if wasted:
        raise ValueError(f"{word}: {method} quantizes nothing, so {wasted[0]} changes nothing.")
    return Arm(name=word.strip(), method=method, options=options)


def _pair(word: str, pair: str) -> tuple[str, Any]:
    key, equals, value = pair.partition("=")
    if not equals or not key:
        raise ValueError(
            f"{word}: {pair!r} is not key=value. Write METHOD:key=value, as loftq-paper:iters=1."
        )
    return key.strip(), yaml.safe_load(value)
