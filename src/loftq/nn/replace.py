"""Packed layers in the place of dense ones, anywhere in a model."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import nn

from loftq.formats import FormatSpec, QuantizedTensor
from loftq.nn.linear import QuantLinear
from loftq.nn.packed import PackedLayer

Builders = Mapping[type[nn.Module], type[PackedLayer]]
LINEAR: Builders = {nn.Linear: QuantLinear}
SAME_FORWARD = frozenset({"FalconLinear", "NonDynamicallyQuantizableLinear"})
"""Subclasses of a stock layer that compute what it computes."""


def builder_of(module: nn.Module, builders: Builders) -> type[PackedLayer] | None:
    """The packed class that can stand in for `module`, or None.

    A subclass counts only if it computes what its base does.
    """
    for base, packed in builders.items():
        if type(module) is base:
            return packed
        same = type(module).__name__ in SAME_FORWARD or (
            isinstance(module, base) and type(module).forward is base.forward
        )
        if isinstance(module, base) and same and not isinstance(module, PackedLayer):
            return packed
    return None


def replace_layer(
    model: nn.Module,
    path: str,
    spec: FormatSpec,
    *,
    shape: tuple[int, int] | None = None,
    builders: Builders = LINEAR,
) -> PackedLayer:
    """Put an unfilled packed layer at `path`, on the device and in the dtype of the dense one.

    Args:
        model: changed in place.
        path: of the module, for example model.layers.0.mlp.up_proj.
        spec: the format.
        shape: (out_features, in_features) that the layer must have; None = do not check.
        builders: dense class -> packed class.

    Raises:
        ValueError: no such module, a module without a packed counterpart, or another shape.
    """
    try:
        module = model.get_submodule(path)
    except AttributeError as error:
        raise ValueError(f"{path}: the model has no such module ({error}).") from None
    packed = builder_of(module, builders)
    if packed is None:
        known = ", ".join(base.__name__ for base in builders)
        raise ValueError(
            f"{path}: found a {type(module).__name__}, expected {known}. It has no packed "
            'counterpart: leave it dense with skip=["*' + path.rsplit(".", 1)[-1] + '"].'
        )
    layer = packed.from_dense(module, spec)
    layer.path = path
    if shape is not None and layer.packed_shape != shape:
        raise ValueError(
            f"{path}: the model has a weight of shape {layer.packed_shape}, the packed weight is "
            f"{shape}. The config does not belong to these weights."
        )
    model.set_submodule(path, layer)
    return layer


def pack_layer(
    model: nn.Module, path: str, quantized: QuantizedTensor, *, builders: Builders = LINEAR
) -> PackedLayer:
    """Replace the dense layer at `path` by a packed one that holds `quantized`."""
    layer = replace_layer(model, path, quantized.spec, shape=quantized.shape, builders=builders)
    return layer.fill_(quantized)


def packed_layers(model: nn.Module) -> dict[str, PackedLayer]:
    """The packed layers of a model by path, in the model's order."""
    return {path: m for path, m in model.named_modules() if isinstance(m, PackedLayer)}


def dequantize_model_(model: nn.Module, dtype: torch.dtype | None = None) -> list[str]:
    """Make every packed layer dense, in place. Returns the paths."""
    found = packed_layers(model)
    for layer in found.values():
        layer.dequantize_(dtype)
    return list(found)
