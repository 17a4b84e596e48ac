"""What the layout of another engine is to us, and the rules that several of them share.

A layout holds a weight exactly when it has the same levels, groups and scale coding. Whether it
does is a property of format, shape and kind, known before any work: `pipeline/serving.py` tells it
in the plan and `integrations/export` refuses by it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from torch import Tensor

from loftq.checkpoint.layout import TensorSpec
from loftq.formats import FormatSpec, QuantizedTensor


@dataclass(frozen=True, kw_only=True)
class Packed:
    """A packed weight, as far as a layout asks."""

    module: str
    """Path of its module in the model."""
    stem: str
    """Name of its tensors in the checkpoint, without `.weight`."""
    spec: FormatSpec
    shape: tuple[int, int]
    """(out_features, in_features)."""
    kind: str = "linear"
    """linear, conv1d (stored transposed in dense checkpoints) or embedding."""


class Layout(Protocol):
    """How one engine stores packed weights."""

    name: str
    """Name of the export target."""
    engine: str
    """Engine and format, for people."""
    readers: tuple[str, ...]
    """Engines that read it, as --for names them."""
    one_coding: bool
    """Whether the scales of a model need the same coding."""
    one_format: bool
    """Whether all layers of a model need the same format."""
    advice: str
    """The format to choose at quantize time, as words of the command line."""

    def obstacle(self, weight: Packed) -> str:
        """Why the layout cannot hold the weight without rounding again; "" if it can."""

    def tensors(self, weight: Packed) -> list[TensorSpec]:
        """The tensors that hold the weight, under their full names."""

    def pack(self, weight: Packed, stored: QuantizedTensor) -> dict[str, Tensor]:
        """Those tensors, filled from our codes and scales."""

    def unpack(self, weight: Packed, tensors: Mapping[str, Tensor]) -> Tensor:
        """The weight (out_features, in_features) float32 that such tensors stand for.

        Written from the engine's formula, not as the inverse of `pack`: it is the check of it.
        """

    def config(self, weights: Sequence[Packed], kept: Sequence[str]) -> dict[str, Any]:
        """`quantization_config` of config.json; `kept` are the linear-like modules left dense."""


def first_obstacle(layout: Layout, weights: Sequence[Packed]) -> str:
    """The first weight that the layout cannot hold, with the reason; "" if it holds them all."""
    for weight in weights:
        found = "an embedding" if weight.kind == "embedding" else rotated(weight)
        found = found or layout.obstacle(weight)
        if found:
            return f"{weight.module} ({weight.spec}): {found}"
    formats = sorted({str(weight.spec) for weight in weights})
    if layout.one_format and len(formats) > 1:
        return f"one format for the whole model, found {', '.join(formats)}"
    codings = sorted({weight.spec.scale_coding for weight in weights})
    if layout.one_coding and len(codings) > 1:
        return f"scales of one kind in the whole model, found {' and '.join(codings)}"
    return ""


def rotated(weight: Packed) -> str:
    """A weight in a rotated basis: no other engine turns the inputs of a layer."""
    if weight.spec.rotation:
        return "its inputs are rotated, which the engine does not do"
    return ""


def partial_groups(weight: Packed) -> str:
    """Rows that do not consist of whole groups: no other engine has a shorter last group."""
    columns, size = weight.shape[1], weight.spec.group_size
    if size > 0 and columns % size:
        return f"{columns} columns are not whole groups of {size}"
    return ""


def transposed(weight: Packed) -> str:
    """GPT-2's Conv1D, which most engines take for a linear layer of the other orientation."""
    return "a Conv1D, stored transposed" if weight.kind == "conv1d" else ""
