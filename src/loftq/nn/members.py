"""Several adapters on one packed layer, all in one pass.

The rows of a batch are ordered by member: (members x rows, ..., in_features). The packed weight is
read once for all of them, and the corrections are two batched products.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from loftq.ops.groups import add_stacked


class MemberLinear(nn.Module):
    """y_m = W x_m + s B_m A_m x_m for every member m.

    Args:
        base: the layer that all members share; not trained.
        lora_A: (members, rank, in_features).
        lora_B: (members, out_features, rank).
        scaling: s, the factor before B A.
    """

    stacked_A: Tensor
    """A of all members one below the other, (members x rank, in_features)."""
    stacked_B: Tensor
    """s B of all members side by side, (out_features, members x rank)."""

    def __init__(self, base: nn.Module, lora_A: Tensor, lora_B: Tensor, scaling: float) -> None:
        super().__init__()
        if lora_A.shape[:2] != (lora_B.shape[0], lora_B.shape[2]):
            raise ValueError(
                f"A {tuple(lora_A.shape)} and B {tuple(lora_B.shape)}: expected (members, rank, "
                "in_features) and (members, out_features, rank)."
            )
        self.base = base
        self.members = len(lora_A)
        beside = (scaling * lora_B).transpose(0, 1).flatten(1)
        self.register_buffer("stacked_A", lora_A.flatten(0, 1).contiguous(), persistent=False)
        self.register_buffer("stacked_B", beside.contiguous(), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """x (members x rows, ..., in_features) -> (members x rows, ..., out_features)."""
        return add_stacked(self.base(x), x, self.stacked_A, self.stacked_B, self.members)


class MemberModules(nn.Module):
    """A module of its own for each member, such as a head: each sees its rows of the batch.

    Args:
        modules: one a member, of the same kind.
    """

    def __init__(self, modules: Sequence[nn.Module]) -> None:
        super().__init__()
        self.each = nn.ModuleList(modules)

    def forward(self, x: Tensor, *args: object, **kwargs: object) -> Tensor:
        """x (members x rows, ...) -> the modules' outputs, in the same order."""
        parts = x.chunk(len(self.each))
        if len(parts) != len(self.each) or len({len(part) for part in parts}) > 1:
            raise ValueError(f"{len(x)} rows cannot be dealt out to {len(self.each)} members.")
        pairs = zip(self.each, parts, strict=True)
        return torch.cat([module(part, *args, **kwargs) for module, part in pairs])


def attach_members_(
    model: nn.Module,
    factors: Mapping[str, tuple[Tensor, Tensor]],
    heads: Mapping[str, Sequence[Mapping[str, Tensor]]],
    *,
    scaling: float,
) -> None:
    """Give a model the adapters of several members, in place.

    Args:
        model: packed (or dense), without adapters.
        factors: module path -> A (members, rank, in), B (members, out, rank).
        heads: module path -> a state dict for each member, of modules that were trained in full.
        scaling: the factor before B A, the same everywhere.

    Raises:
        ValueError: a path that the model does not have, or shapes that do not fit.
    """
    for path, (A, B) in factors.items():
        base = _find(model, path)
        weight = next(base.parameters())
        made = MemberLinear(base, A, B, scaling).to(weight.device)
        _replace(model, path, made)
    for path, states in heads.items():
        original = _find(model, path)
        copies = []
        for state in states:
            copies.append(copy.deepcopy(original))
            copies[-1].load_state_dict(dict(state))
        _replace(model, path, MemberModules(copies))


def for_members(inputs: Mapping[str, Tensor], members: int) -> dict[str, Tensor]:
    """A batch repeated for each member: (rows, ...) -> (members x rows, ...)."""
    return {key: value.repeat(members, *[1] * (value.dim() - 1)) for key, value in inputs.items()}


def _find(model: nn.Module, path: str) -> nn.Module:
    try:
        return model.get_submodule(path)
    except AttributeError as error:
        raise ValueError(f"{path}: the model has no such module ({error}).") from error


def _replace(model: nn.Module, path: str, module: nn.Module) -> None:
    parent, _, name = path.rpartition(".")
    setattr(model.get_submodule(parent), name, module)
