"""What the quality benchmarks share: a model packed in memory, and what that cost its weights."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass
from typing import Any

from torch import nn

import loftq


@dataclass(frozen=True, kw_only=True)
class Packed:
    """A packed model with its start adapter, and figures over its quantized weights."""

    model: nn.Module
    bits: float
    """Mean over layers of the packed bits per weight, adapters not counted."""
    mean_error: float
    """Mean over layers of ||W - Q - s B A||_F / ||W||_F."""
    global_error: float
    """sqrt(sum ||W - Q - s B A||_F^2 / sum ||W||_F^2): large weights count more."""
    seconds: float
    """Of quantizing."""

    @property
    def errors(self) -> str:
        """Both errors as cells of a markdown row."""
        return f"{self.mean_error:.4f} | {self.global_error:.4f}"


def pack(model: nn.Module, **options: Any) -> Packed:
    """Quantize a loaded model in place; `options` are those of `loftq.quantize_model`."""
    squares = {
        name.removesuffix(".weight"): p.detach().double().square().sum().item()
        for name, p in model.named_parameters()
    }
    records: list[dict[str, Any]] = []
    start = time.perf_counter()
    adapted = loftq.quantize_model(
        model, on_batch=lambda _batch, found, _done: records.extend(found), **options
    ).eval()
    seconds = time.perf_counter() - start
    lost = sum(r["error"] ** 2 * squares[r["name"]] for r in records)
    return Packed(
        model=adapted,
        bits=sum(r["bits_per_weight"] for r in records) / len(records),
        mean_error=sum(r["error"] for r in records) / len(records),
        global_error=math.sqrt(lost / sum(squares[r["name"]] for r in records)),
        seconds=seconds,
    )
