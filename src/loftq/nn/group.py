"""Adapted packed layers that read one input, computed together for training.

    y_i = W_i x + b_i + s_i B_i u_i,   [u_1; u_2; ...] = [A_1; A_2; ...] x

Two nodes of the autograd graph make a group. `_Down` computes u in one product and keeps x and u;
`_Up` computes the outputs and keeps nothing: its backward reads what `_Down` kept. So, when
checkpointing computes a block again, it has all it wants once the last u is there and never
repeats the large product of a last layer. The gradient of x is summed in place: `_Up` leaves its
part with `_Down`, whose backward always runs after.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from loftq.nn.linear import QuantLinear
from loftq.ops import hadamard, quant_linear
from loftq.ops.direct import direct
from loftq.ops.schema import quant_linear_backward


@dataclass(frozen=True)
class Adapted:
    """A packed layer with the one adapter that is trained on it."""

    layer: QuantLinear
    A: Tensor
    """lora_A (rank, in_features)."""
    B: Tensor
    """lora_B (out_features, rank)."""
    scaling: float


def project(x: Tensor, group: Sequence[Adapted]) -> tuple[Tensor, ...]:
    """The outputs of every layer of a group for one x, with gradients to x and the adapters.

    Args:
        x: (..., in_features) in the dtype of the computation; A and B are cast to it.
        group: layers of equal in_features, whose weights and biases are frozen.

    Returns:
        One (..., out_features) a layer, in x's dtype.
    """
    u = _Down.apply(x, tuple(group), *[one.A for one in group])
    return _Up.apply(x, u, tuple(group), *[one.B for one in group])


@dataclass(frozen=True)
class _Passed:
    """What the backward of `_Up` leaves for that of `_Down`: checkpointing unpacks but once."""

    x: Tensor
    grad_x: Tensor | None
    """Sum of dL/dy_i W_i, (tokens, in_features)."""


class _Down(torch.autograd.Function):
    """u = x [A_1; A_2; ...]^T, (tokens, sum of ranks)."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: tuple[Adapted, ...], *As: Tensor) -> Tensor:
        u = _rows(x) @ _stack(As, x.dtype).T
        ctx.save_for_backward(x, u)
        # Parameters are not saved but watched: each saved tensor costs checkpointing 10 us.
        ctx.group, ctx.versions = group, _versions(group)
        return u

    @staticmethod
    def backward(ctx: Any, grad_u: Tensor) -> tuple[Tensor | None, ...]:
        passed, ctx.passed = ctx.passed, None
        x, grad_x, As = passed.x, passed.grad_x, [one.A for one in ctx.group]
        if grad_x is not None:
            grad_x = grad_x.addmm_(grad_u, _stack(As, x.dtype)).view(x.shape)
        grads = (grad_u.T @ _rows(x)).split([len(A) for A in As])
        return grad_x, None, *[grad.to(A.dtype) for grad, A in zip(grads, As, strict=True)]


class _Up(torch.autograd.Function):
    """y_i = W_i x + b_i + s_i B_i u_i for every layer."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, u: Tensor, group: tuple[Adapted, ...], *Bs: Tensor
    ) -> tuple[Tensor, ...]:
        ctx.down, ctx.wants_x = u.grad_fn, x.requires_grad
        ctx.set_materialize_grads(False)
        parts = u.split([B.shape[1] for B in Bs], dim=1)
        turned = {one.layer.spec.rotation: x for one in group}
        for block in filter(None, turned):  # once for all that share a rotation
            turned[block] = direct(hadamard, x)(x, block, False)
        return tuple(
            _output(turned[one.layer.spec.rotation], part, one)
            for part, one in zip(parts, group, strict=True)
        )

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        x, u = ctx.down.saved_tensors
        group = ctx.down.group
        if _versions(group) != ctx.down.versions:
            raise RuntimeError(
                "an adapter was changed in place between the forward and the backward of a step: "
                "make the optimizer's step after the backward."
            )
        ranks = [one.B.shape[1] for one in group]
        grad_u = torch.empty_like(u)
        grad_turned: dict[int, Tensor] = {}
        grad_Bs: list[Tensor | None] = []
        parts = zip(grads, u.split(ranks, 1), grad_u.split(ranks, 1), group, strict=True)
        for grad, part, grad_part, one in parts:
            if grad is None:  # an output that nothing was computed from
                grad_part.zero_()
                grad_Bs.append(None)
                continue
            rows = _rows(grad)
            torch.mm(rows, _scaled(one.B, one.scaling, u.dtype), out=grad_part)
            grad_Bs.append(_scaled(rows.T @ part, one.scaling, one.B.dtype))
            if ctx.wants_x:
                mine = _backward_of_weight(rows, one.layer)
                block = one.layer.spec.rotation
                before = grad_turned.get(block)
                grad_turned[block] = mine if before is None else before.add_(mine)
        ctx.down.passed = _Passed(x, _turned_back(grad_turned))
        return None, grad_u, None, *grad_Bs


def _output(x: Tensor, u: Tensor, one: Adapted) -> Tensor:
    layer = one.layer
    y = direct(quant_linear, x)(
        x, layer.weight_packed, layer.weight_scale, layer.weight_zero, layer.weight_nested,
        *layer.layout,
    )  # fmt: skip
    if layer.bias is not None:
        y += layer.bias.to(y.dtype)
    y.view(-1, y.shape[-1]).addmm_(u, _scaled(one.B, one.scaling, y.dtype).T)
    return y


def _turned_back(grads: dict[int, Tensor]) -> Tensor | None:
    """dL/dx from its parts in the bases that weights are stored in, by block of the rotation."""
    total = None
    for block, grad in grads.items():
        mine = direct(hadamard, grad)(grad, block, True) if block else grad
        total = mine if total is None else total.add_(mine)
    return total


def _backward_of_weight(grad: Tensor, layer: QuantLinear) -> Tensor:
    return direct(quant_linear_backward, grad)(
        grad, layer.weight_packed, layer.weight_scale, layer.weight_zero, layer.weight_nested,
        layer.in_features, *layer.layout,
    )  # fmt: skip


def _scaled(B: Tensor, scaling: float, dtype: torch.dtype) -> Tensor:
    """s B in another dtype."""
    return (B if scaling == 1 else B * scaling).to(dtype)


def _versions(group: tuple[Adapted, ...]) -> list[tuple[int, int]]:
    return [(one.A._version, one.B._version) for one in group]


def _stack(As: Sequence[Tensor], dtype: torch.dtype) -> Tensor:
    cast = [A.to(dtype) for A in As]
    return cast[0] if len(cast) == 1 else torch.cat(cast)


def _rows(x: Tensor) -> Tensor:
    return x.reshape(-1, x.shape[-1])
