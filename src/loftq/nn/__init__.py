"""Modules that run: layers whose weights stay packed."""

from loftq.nn.linear import QuantLinear
from loftq.nn.packed import PackedLayer
from loftq.nn.replace import (
    LINEAR,
    Builders,
    builder_of,
    dequantize_model_,
    pack_layer,
    packed_layers,
    replace_layer,
)

__all__ = [
    "LINEAR",
    "Builders",
    "PackedLayer",
    "QuantLinear",
    "builder_of",
    "dequantize_model_",
    "pack_layer",
    "packed_layers",
    "replace_layer",
]
