"""A backbone that needs its adapter says so, once, when it runs without."""

from __future__ import annotations

import itertools
import warnings
import weakref
from pathlib import Path
from typing import Any

import torch
from torch import nn

from loftq.nn import PackedLayer, packed_layers
from loftq.nn.members import MemberLinear

_pending: dict[int, weakref.ref[nn.Module]] = {}
_keys = itertools.count()


def guard_adapter(model: nn.Module) -> None:
    """Check at the first forward that an adapter of the backbone's lineage is attached.

    A hook on the first packed layer, which runs whether the model is called through PEFT or not. It
    removes itself after one call. Under torch.compile the check runs while tracing and leaves
    nothing in the graph.
    """
    first = next(iter(packed_layers(model).values()), None)
    if first is None:
        return
    hook = _Hook(next(_keys))
    _pending[hook.key] = weakref.ref(model)
    hook.handle = first.register_forward_pre_hook(hook)


def is_guard(hook: object) -> bool:
    """Whether a forward hook is the one of `guard_adapter`, which computes nothing."""
    return isinstance(hook, _Hook)


class _Hook:
    handle: Any = None

    def __init__(self, key: int) -> None:
        self.key = key

    def __call__(self, module: nn.Module, args: Any) -> None:
        _check(self.key)
        if not torch.compiler.is_compiling() and self.handle is not None:
            self.handle.remove()

    def __reduce__(
        self,
    ) -> tuple[type[_Hook], tuple[int]]:  # a copy or a pickle has nothing to check
        return _Hook, (-1,)


@torch.compiler.assume_constant_result
def _check(key: int) -> bool:
    reference = _pending.pop(key, None)
    model = None if reference is None else reference()
    if model is None:
        return False
    first = next(iter(packed_layers(model).values()), None)
    if first is None or _has_start(model):
        return False
    warnings.warn(missing_adapter(model), stacklevel=2)
    return True


def _has_start(model: nn.Module) -> bool:
    """An adapter with B != 0 is attached, or some layers were merged with one.

    The start adapter has B != 0 in every layer; a LoRA made on the spot has B = 0 everywhere.
    """
    for module in model.modules():
        factors = [*getattr(module, "lora_B", {}).values()]
        weights = [factor.weight for factor in factors if isinstance(factor, nn.Linear)]
        weights += [*getattr(module, "lora_embedding_A", {}).values()]
        weights += [module.stacked_B] if isinstance(module, MemberLinear) else []
        if any(weight.is_meta or bool(weight.detach().any()) for weight in weights):
            return True
    config = getattr(getattr(model, "config", None), "quantization_config", None)
    listed = getattr(config, "layers", None) or {}
    return len(listed) > sum(isinstance(m, PackedLayer) for m in model.modules())


def missing_adapter(model: nn.Module) -> str:
    """The warning, with the line that fixes it."""
    name = getattr(model, "name_or_path", "") or "OUT"
    if Path(name).is_dir() and not (Path(name) / "init_adapter").is_dir():  # saved again elsewhere
        folder, name = "OUT/init_adapter", f"{name} (OUT: the folder it was first loaded from)"
    else:
        folder = f"{name}/init_adapter"
    return (
        f"{name}: this backbone was chosen together with its start adapter and is worse than plain "
        "rounding without it, and no such adapter is attached (a fresh LoRA does not count). "
        "Attach it before anything else:\n"
        f"    model = PeftModel.from_pretrained(model, {folder!r}, is_trainable=True)"
    )
