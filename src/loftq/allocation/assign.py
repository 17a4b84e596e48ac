"""Mixed precision: the paper's first k blocks, then overrides by name."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Protocol

from loftq.allocation.patterns import matches, unmatched
from loftq.formats import FormatSpec


class PlacedLayer(Protocol):
    """What allocation needs to know of a layer; `pipeline.layout.LayerInfo` is one."""

    @property
    def module(self) -> str:
        """Path of the module."""

    @property
    def depth(self) -> int | None:
        """Index of its block, None outside of blocks."""


def first_k_blocks(bits: float, blocks: int) -> int:
    """How many of the first blocks get 4 bits, the rest 2, for an average of `bits`.

    k = floor(blocks (bits - 2) / 2): 16, 8 and 4 of 32 blocks for 3, 2.5 and 2.25 bits (LoftQ,
    arXiv:2310.08659, caption of Table 5). For the 40 blocks of LLaMA-2-13b the rule, which is that
    of the authors' first code, gives 20, 10 and 5; the caption's 16, 8 and 4 would average 2.8, 2.4
    and 2.2 bits. We keep the average that was asked for. Whole blocks round it down.

    Args:
        bits: code bits per weight, 2 <= bits <= 4, scales not counted.
        blocks: repeated blocks of the model, at least 1.

    Raises:
        ValueError: bits outside of [2, 4], or a model without blocks.
    """
    if not (math.isfinite(bits) and 2 <= bits <= 4):
        raise ValueError(
            f"bits={bits:g}: a mix of 4- and 2-bit blocks averages between 2 and 4. "
            "Choose bits in that range, or name a format."
        )
    if blocks < 1:
        raise ValueError(
            f"bits={bits:g}: a mix by depth needs repeated blocks, and none were found in this "
            "model. Choose 4 or 2 bits, or name a format."
        )
    # Rounded to 9 digits first: 2.3 bits of 20 blocks are 2.9999... in binary and mean 3.
    return math.floor(round(blocks * (bits - 2) / 2, 9))


def assign_formats(
    layers: Sequence[PlacedLayer],
    default: FormatSpec,
    *,
    first: tuple[int, FormatSpec] | None = None,
    chosen: Mapping[str, FormatSpec] | None = None,
    overrides: Mapping[str, FormatSpec] | None = None,
) -> dict[str, FormatSpec]:
    """Format of every layer: `default`, then `first`, `chosen`, then `overrides` in order.

    Args:
        layers: the layers to quantize; layers without depth (embeddings, for instance) are never
            among the first blocks.
        default: of every layer that nothing else names.
        first: (k, format) for the layers of the first k blocks.
        chosen: module path -> format, of a measured allocation.
        overrides: pattern (see `allocation.patterns`) -> format; the last match wins.

    Returns:
        Module path -> format, in the order of `layers`.

    Raises:
        ValueError: a pattern that matches no layer, or more first blocks than there are.
    """
    overrides, chosen = overrides or {}, chosen or {}
    _check(layers, first, list(overrides))
    formats = {}
    for layer in layers:
        spec = default
        if first is not None and layer.depth is not None and layer.depth < first[0]:
            spec = first[1]
        spec = chosen.get(layer.module, spec)
        for pattern, override in overrides.items():
            if matches(pattern, layer.module):
                spec = override
        formats[layer.module] = spec
    return formats


def _check(
    layers: Sequence[PlacedLayer], first: tuple[int, FormatSpec] | None, patterns: list[str]
) -> None:
    complaint = unmatched(patterns, [layer.module for layer in layers], where="formats")
    if complaint:
        raise ValueError(complaint)
    if first is None:
        return
    blocks = 1 + max((layer.depth for layer in layers if layer.depth is not None), default=-1)
    if not 0 <= first[0] <= blocks:
        raise ValueError(
            f"first={first[0]} blocks in {first[1]}: the layers to quantize lie in {blocks} "
            f"blocks. Choose 0 to {blocks}."
        )
