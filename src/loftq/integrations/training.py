"""A stock transformers + PEFT model, made fast for training without new modules.

Its layers are packed; those that are dense, as in LoRA on 16-bit weights, take the same path.

Layers, norms, attentions and MLPs keep their class, their parameters and their names and get a
`forward` of their own that computes the same in fewer passes: projections that share an input as a
group (nn/group.py), norms, rotary embeddings and gated activations in one kernel each
(ops/pointwise.py). What a class computes is found out by a trial of the class on a few numbers,
never by its name, so that an architecture that departs from the pattern is left as it is. Each
forward steps aside, call by call, for the stock one whenever it would not compute the same.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from itertools import product
from typing import Any

import torch
from torch import Tensor, nn

from loftq.integrations.families import READ_ONE_INPUT
from loftq.integrations.grouped import Bound, GroupedLayer, Handed, to_train, why_not_trained
from loftq.integrations.inference import is_adapted, undo_inference
from loftq.integrations.pattern import activation_of, norm_of, rotary_forward
from loftq.nn.group import project
from loftq.nn.packed import autocast
from loftq.ops import pointwise

PROJECTIONS = (READ_ONE_INPUT, ("query", "key", "value"), ("q", "k", "v"))
"""Names that attentions have for them: Llama's, BERT's, MPNet's."""
CROSS_ATTENTION = ("is_encoder_decoder", "add_cross_attention")
"""Entries of a config."""


@dataclass(frozen=True, kw_only=True)
class TrainingPlan:
    """Which modules take which path in training."""

    grouped: tuple[tuple[str, ...], ...]
    """Paths of adapted layers, those that are computed together side by side."""
    norms: int
    """Norms that run as one kernel."""
    rotary: int
    """Attentions whose rotary embedding does."""
    gates: int
    """MLPs whose gated activation does."""
    left: dict[str, str] = field(default_factory=dict)
    """Paths of adapted layers that run PEFT's forward -> why."""

    @property
    def reasons(self) -> str:
        """Which layers run PEFT's forward, a clause for each reason; "" if none does."""
        paths: dict[str, list[str]] = {}
        for path, why in self.left.items():
            paths.setdefault(why, []).append(path)
        return "; ".join(
            f"{len(same)} layers run PEFT's forward ({why}): {same[0]}, ..."
            for why, same in paths.items()
        )

    def __str__(self) -> str:
        layers = sum(map(len, self.grouped))
        head = (
            f"training layer: {layers} adapted layers in {len(self.grouped)} groups; one kernel "
            f"for each of {self.norms} norms, {self.rotary} rotary embeddings, {self.gates} gates"
        )
        return f"{head}; {self.reasons}" if self.left else head


def fuse_for_training(model: nn.Module) -> TrainingPlan:
    """Bind the fast forwards, in place; `undo_training` takes them away.

    Args:
        model: a PEFT model, on a packed backbone or on a dense one.
    """
    undo_training(model)
    undo_inference(model)
    paths = {module: path for path, module in model.named_modules()}
    adapted = [module for module in paths if is_adapted(module) or _is_adapted_dense(module)]
    left = {paths[m]: why for m in adapted if (why := why_not_trained(m))}
    shared = () if _attends_elsewhere(model) else paths
    groups = _groups(shared, [m for m in adapted if paths[m] not in left])
    for layers in groups:
        handed = Handed()
        for index, layer in enumerate(layers):
            _bind(layer, GroupedLayer(layer, layers, index, handed))
    free = [module for module in paths if "forward" not in module.__dict__]
    norms, rotary = (sum(map(bind, free)) for bind in (_bind_norm, _bind_rotary))
    gates = [module for module in free if _bind_gate(module)]
    return TrainingPlan(
        grouped=tuple(tuple(map(paths.__getitem__, g)) for g in _with_gates(groups, gates)),
        norms=norms,
        rotary=rotary,
        gates=len(gates),
        left=left,
    )


def undo_training(model: nn.Module) -> None:
    """Give every module its stock forward back."""
    for module in model.modules():
        bound = module.__dict__.get("forward")
        if isinstance(bound, Bound):
            del module.forward


class _Norm(Bound):
    def __init__(self, module: nn.Module, eps: float, offset: float) -> None:
        super().__init__(module)
        self.eps, self.offset = eps, offset

    def __call__(self, x: Tensor) -> Tensor:
        weight: Any = self.module.weight
        if weight.requires_grad or weight.dtype != x.dtype or torch.compiler.is_compiling():
            return self.stock(x)
        return pointwise.call_rms_norm(x, weight, self.eps, self.offset)


class _Rotary(Bound):
    def __init__(self, module: nn.Module, rotated: Any) -> None:
        super().__init__(module)
        self.rotated = rotated

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.rotated(self.module, *args, **kwargs)


class _Gate(Bound):
    def __init__(self, module: nn.Module, activation: str) -> None:
        super().__init__(module)
        self.activation = activation

    def __call__(self, x: Tensor) -> Tensor:
        mlp: Any = self.module
        if torch.compiler.is_compiling():
            return self.stock(x)
        pair = to_train(x, mlp.gate_proj, mlp.up_proj)
        if pair:  # made here, for nobody else
            gate, up = project(autocast(x), pair)
            inner = pointwise.call_gate_once(gate, up, self.activation)
        else:
            inner = pointwise.call_gate(mlp.gate_proj(x), mlp.up_proj(x), self.activation)
        return mlp.down_proj(inner)


def _groups(
    modules: Iterable[nn.Module], adapted: Sequence[nn.Module]
) -> list[tuple[nn.Module, ...]]:
    """The adapted layers by who reads the same input, each once."""
    found: dict[nn.Module, tuple[nn.Module, ...]] = {layer: (layer,) for layer in adapted}
    for module, names in product(modules, PROJECTIONS):
        layers: list[Any] = [getattr(module, name, None) for name in names]
        shared = tuple(layer for layer in layers if layer in found)
        if len(shared) == len(names) and len({one.in_features for one in shared}) == 1:
            found.update(dict.fromkeys(shared, shared))
    return list(dict.fromkeys(found.values()))


def _attends_elsewhere(model: Any) -> bool:
    """Whether some attentions read keys and values from another sequence than queries."""
    config = getattr(model, "config", None)
    return any(getattr(config, name, False) for name in CROSS_ATTENTION)


def _with_gates(
    groups: Sequence[tuple[nn.Module, ...]], gates: Iterable[Any]
) -> list[tuple[nn.Module, ...]]:
    """The groups as they are computed: an MLP joins the two that its gate multiplies."""
    single = {layers[0] for layers in groups if len(layers) == 1}
    pairs = [(mlp.gate_proj, mlp.up_proj) for mlp in gates]
    joined = {one: pair for pair in pairs if single.issuperset(pair) for one in pair}
    return list(dict.fromkeys(joined.get(layers[0], layers) for layers in groups))


def _is_adapted_dense(module: nn.Module) -> bool:
    """Whether this is a PEFT layer around a plain linear one, as of LoRA on 16-bit weights."""
    base = getattr(module, "base_layer", None)
    return type(base) is nn.Linear and hasattr(module, "lora_A")


def _bind(module: nn.Module, forward: Bound) -> None:
    module.forward = forward  # type: ignore[assignment]


def _bind_norm(module: nn.Module) -> bool:
    if found := norm_of(module):
        _bind(module, _Norm(module, *found))
    return found is not None


def _bind_rotary(module: nn.Module) -> bool:
    if rotated := rotary_forward(type(module)):  # type: ignore[arg-type]
        _bind(module, _Rotary(module, rotated))
    return rotated is not None


def _bind_gate(module: nn.Module) -> bool:
    if activation := activation_of(module):
        _bind(module, _Gate(module, activation))
    return activation is not None
