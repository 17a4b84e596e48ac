"""The forward that the training layer gives a PEFT layer, and when it steps aside for PEFT's own.

The first layer of a group that is called computes for all of them (nn/group.py); the others take
what it left.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from loftq.integrations.inference import active_adapter, why_not_folded
from loftq.nn.group import Adapted, project
from loftq.nn.packed import autocast


class Bound:
    """A forward that was put in front of that of a module's class."""

    def __init__(self, module: nn.Module) -> None:
        self.module = module

    def stock(self, *args: Any, **kwargs: Any) -> Any:
        """What the class computes."""
        return type(self.module).forward(self.module, *args, **kwargs)


class Handed:
    """Outputs that the first layer of a group computed for the others, until they ask."""

    def __init__(self) -> None:
        self.x: Tensor | None = None
        self.outputs: dict[int, Tensor] = {}

    def take(self, x: Tensor, index: int) -> Tensor | None:
        """The output `index` for the very same x, once."""
        if x is not self.x:
            return None
        y = self.outputs.pop(index, None)
        if not self.outputs:
            self.x = None
        return y

    def keep(self, x: Tensor, outputs: dict[int, Tensor]) -> None:
        """Wait for the others; what an earlier x left behind is dropped."""
        self.x, self.outputs = (x, outputs) if outputs else (None, {})


class GroupedLayer(Bound):
    """Of a PEFT layer: its part of what its group computes."""

    def __init__(
        self, module: nn.Module, layers: Sequence[nn.Module], index: int, handed: Handed
    ) -> None:
        super().__init__(module)
        self.layers, self.index, self.handed = layers, index, handed
        self.signature: tuple[object, ...] = ()
        self.found: Adapted | None = None

    def __call__(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if args or kwargs:
            return self.stock(x, *args, **kwargs)
        if (y := self.handed.take(x, self.index)) is not None:
            return y
        asked = to_train(x, *self.layers)
        if not asked:
            return self.stock(x)
        outputs = dict(enumerate(project(autocast(x), asked)))
        y = outputs.pop(self.index)
        self.handed.keep(x, outputs)
        return y

    def adapted(self) -> Adapted | None:
        """The layer with its adapter; None where PEFT's forward is to run."""
        signature = _signature(self.module)
        if signature != self.signature:
            self.signature, self.found = signature, _adapted(self.module)
        return self.found


def to_train(x: Tensor, *layers: Any) -> list[Adapted]:
    """The layers as a group to compute now; empty where PEFT's forward is to run."""
    if torch.compiler.is_compiling() or not (layers[0].training or torch.is_grad_enabled()):
        return []
    bound = [layer.forward for layer in layers]
    found = [one.adapted() if isinstance(one, GroupedLayer) else None for one in bound]
    return [] if None in found else found  # type: ignore[return-value]


def why_not_trained(module: Any) -> str:
    """Reason that this PEFT layer runs PEFT's forward in training, or ""."""
    if why := why_not_folded(module):
        return why
    if _is_foreign(module) or _is_foreign(module.base_layer):
        return "another library put a forward of its own in front of it"
    name = active_adapter(module)
    if torch.is_grad_enabled() and not all(
        factors[name].weight.requires_grad for factors in (module.lora_A, module.lora_B)
    ):
        return "its adapter is not trained"
    dropout = module.lora_dropout[name]
    if not isinstance(dropout, nn.Identity) and dropout.p > 0:
        return "its adapter has dropout"
    base = module.base_layer
    if base.bias is not None and base.bias.requires_grad:
        return "its bias is trained"
    if type(base) is nn.Linear and base.weight.requires_grad:  # packed ones never are
        return "its weight is trained"
    return ""


def _adapted(layer: Any) -> Adapted | None:
    if why_not_trained(layer):
        return None
    name = active_adapter(layer)
    A, B = layer.lora_A[name].weight, layer.lora_B[name].weight
    return Adapted(layer.base_layer, A, B, layer.scaling[name])


def _signature(layer: Any) -> tuple[object, ...]:
    """What `_adapted` depends on and may change between calls, by way of nn.Module's dictionaries.

    To find the layer out anew in every pass takes the host 15 us, as long as two launches.
    """
    parts, names = layer._modules, tuple(layer.active_adapters)
    base = parts["base_layer"]
    bias = base._parameters.get("bias")
    weight = base._parameters.get("weight")
    found: list[object] = [
        names, layer.disable_adapters, layer.merged, torch.is_grad_enabled(), type(base), id(base),
        base.__dict__.get("forward") is None, bias is not None and bias.requires_grad,
        weight is not None and weight.requires_grad,
    ]  # fmt: skip
    for name in names:
        found += [
            layer.scaling.get(name),
            getattr(parts["lora_dropout"]._modules.get(name), "p", 0),
        ]
        for factor in ("lora_A", "lora_B"):
            adapter = parts[factor]._modules.get(name)
            if adapter is not None:
                weight = adapter._parameters["weight"]
                found += [id(weight), weight.requires_grad]
    return tuple(found)


def _is_foreign(module: nn.Module) -> bool:
    bound = module.__dict__.get("forward")
    return bound is not None and not isinstance(bound, Bound)
