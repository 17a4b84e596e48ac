"""Adapters folded into the packed product: one small launch and one large for each linear layer.

A stock PEFT layer runs the packed product, two small products, a scale and an addition, each a
launch and a pass over the output. Here the layer keeps its class and its parameters and gets a
`forward` of its own that calls one operator (ops.quant_linear_lora) whenever that computes the
same: no gradient, one plain LoRA adapter, not merged. In any other case it runs PEFT's forward.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn

from loftq.nn import PackedLayer, QuantLinear
from loftq.nn.packed import autocast
from loftq.ops import quant_linear_lora


@dataclass(frozen=True, kw_only=True)
class Prepared:
    """What `prepare_for_inference` did."""

    folded: tuple[str, ...]
    """Paths of the layers whose adapter is part of the packed product now."""
    left: dict[str, str] = field(default_factory=dict)
    """Paths of the other adapted packed layers -> why they run PEFT's forward."""


def prepare_for_inference(model: nn.Module) -> Prepared:
    """Set a model to eval mode and fold its adapters into its packed layers, in place.

    Weights, state dict, saving, merging and training stay what they are: the folded forward steps
    aside when a gradient is wanted, and `undo_inference` takes it away.

    Args:
        model: a PEFT model on a packed backbone, or a packed model without adapters.
    """
    model.eval()
    folded, left = [], {}
    for path, module in model.named_modules():
        if is_adapted(module):
            if why := why_not_folded(module) or why_turned(module.base_layer):
                left[path] = why
            else:
                module.forward = MethodType(_forward, module)
                folded.append(path)
    return Prepared(folded=tuple(folded), left=left)


def undo_inference(model: nn.Module) -> None:
    """Give every folded layer PEFT's forward back."""
    for module in model.modules():
        if getattr(module.__dict__.get("forward"), "__func__", None) is _forward:
            del module.forward


def is_adapted(module: nn.Module) -> bool:
    """Whether this is a PEFT layer around a packed one."""
    return isinstance(getattr(module, "base_layer", None), PackedLayer)


def why_not_folded(module: Any) -> str:
    """Reason that this PEFT layer cannot compute its adapter inside the packed product, or ""."""
    if type(module).__name__ != "Linear" or not hasattr(module, "lora_A"):
        return f"{type(module).__name__} is not PEFT's LoRA layer for linears"
    base = module.base_layer
    if isinstance(base, PackedLayer) and not isinstance(base, QuantLinear):
        return f"{type(base).__name__} is no packed linear layer"
    if module.disable_adapters or module.merged:
        return "its adapters are disabled or merged"
    active = [name for name in module.active_adapters if name in module.lora_A]
    if len(active) != 1:
        return f"{len(active)} adapters are active, the product holds one"
    if active[0] in module.lora_variant:
        return f"adapter {active[0]!r} is no plain LoRA (DoRA or another variant)"
    if module.lora_B[active[0]].bias is not None:
        return f"adapter {active[0]!r} has a bias"
    return ""


def why_turned(base: Any) -> str:
    """Reason that a packed layer's bytes are no operand of a product with its inputs, or ""."""
    block = base.spec.rotation if isinstance(base, PackedLayer) else 0
    return f"its inputs are rotated in blocks of {block} first" if block else ""


def active_adapter(module: Any) -> str:
    """Name of the one adapter of a layer that `why_not_folded` has nothing against."""
    (name,) = (name for name in module.active_adapters if name in module.lora_A)
    return name


def _forward(self: Any, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    """PEFT's LoRA forward on a packed layer, in one operator where nothing speaks against it."""
    if args or kwargs or self.training or torch.is_grad_enabled() or why_not_folded(self):
        return type(self).forward(self, x, *args, **kwargs)
    base = self.base_layer
    name = active_adapter(self)
    y = quant_linear_lora(
        autocast(x), base.weight_packed, base.weight_scale, base.weight_zero, base.weight_nested,
        *base.layout, self.lora_A[name].weight, self.lora_B[name].weight, self.scaling[name],
    )  # fmt: skip
    return y if base.bias is None else y + base.bias.to(y.dtype)
