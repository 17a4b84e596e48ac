"""Adapted layers that read one input, computed together for training.

    y_i = W_i x + b_i + s_i B_i u_i,   [u_1; u_2; ...] = [A_1; A_2; ...] x

Two nodes of the autograd graph make a group. `_Down` computes u in one product and keeps x and u;
of an x that a norm made it keeps nothing, since the norm keeps what it is made of. `_Up` computes
the outputs and keeps nothing: its backward reads what `_Down` kept. So, when checkpointing computes
a block again, it has all it wants once the last u is there and never repeats the large product of a
last layer. `_Up` differentiates all that x is needed for and lets go of it before the first dense
weight is there; the gradient of x is summed in place and left with `_Down`, whose backward always
runs after.

Adapters are cast to the dtype of the computation in one launch a pass, and their gradients back in
one: a step of a few thousand tokens takes as long as the host needs to launch it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from loftq.nn.frozen import add_gradient, product
from loftq.nn.linear import QuantLinear
from loftq.ops import hadamard
from loftq.ops.direct import direct
from loftq.ops.pointwise import norm_again, norm_behind


@dataclass(frozen=True)
class Adapted:
    """A frozen layer, packed or dense, with the one adapter that is trained on it."""

    layer: nn.Linear
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
    cast = _cast(group, x.dtype)
    u = _Down.apply(x, tuple(group), cast, *[one.A for one in group])
    return _Up.apply(x, u, tuple(group), cast, *[one.B for one in group])


@dataclass(frozen=True)
class _Cast:
    """The adapters and biases of a group in the dtype of the computation."""

    A: Tensor
    """[A_1; A_2; ...], (sum of ranks, in_features)."""
    Bs: Sequence[Tensor]
    """(out_features, rank) each."""
    biases: Sequence[Tensor | None]
    """(out_features,) each."""


@dataclass(frozen=True)
class _Passed:
    """What the backward of `_Up` leaves for that of `_Down`: checkpointing unpacks but once."""

    shape: torch.Size
    """Of x."""
    A: Tensor
    """As of `_Cast`."""
    grad_x: Tensor | None
    """Sum of dL/dy_i W_i, (tokens, in_features)."""
    grad_As: Sequence[Tensor]


class _Down(torch.autograd.Function):
    """u = x [A_1; A_2; ...]^T, (tokens, sum of ranks)."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, group: tuple[Adapted, ...], cast: _Cast, *As: Tensor
    ) -> Tensor:
        u = _rows(x) @ cast.A.T
        ctx.norm = norm_behind(x)
        ctx.save_for_backward(*([u] if ctx.norm else [u, x]))
        # Parameters are not saved but watched: each saved tensor costs checkpointing 10 us.
        ctx.group, ctx.versions = group, _versions(group)
        return u

    @staticmethod
    def backward(ctx: Any, grad_u: Tensor) -> tuple[Tensor | None, ...]:
        passed, ctx.passed = ctx.passed, None
        grad_x = passed.grad_x
        if grad_x is not None:
            grad_x = grad_x.addmm_(grad_u, passed.A).view(passed.shape)
        return grad_x, None, None, *passed.grad_As


class _Up(torch.autograd.Function):
    """y_i = W_i x + b_i + s_i B_i u_i for every layer."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        u: Tensor,
        group: tuple[Adapted, ...],
        cast: _Cast,
        *Bs: Tensor,
    ) -> tuple[Tensor, ...]:
        ctx.down, ctx.wants_x = u.grad_fn, x.requires_grad
        ctx.set_materialize_grads(False)
        inputs = _turned(x, group)
        parts = zip(u.split_with_sizes(_ranks(group), 1), group, cast.Bs, cast.biases, strict=True)
        return tuple(_output(inputs[_rotation(part[1])], *part) for part in parts)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        down, group = ctx.down, ctx.down.group
        u, *kept = down.saved_tensors
        if _versions(group) != down.versions:
            raise RuntimeError(
                "an adapter was changed in place between the forward and the backward of a step: "
                "make the optimizer's step after the backward."
            )
        x = norm_again(down.norm) if down.norm else kept.pop()
        rows = [None if grad is None else _rows(grad) for grad in grads]
        cast, shape = _cast(group, u.dtype), x.shape
        grad_u, grad_As, grad_Bs = _of_adapters(rows, group, cast, _rows(x), u)
        del x, u
        grad_x = _of_input(rows, group) if ctx.wants_x else None
        down.passed = _Passed(shape, cast.A, grad_x, grad_As)
        return None, grad_u, None, None, *grad_Bs


def _of_adapters(
    grads: Sequence[Tensor | None],
    group: Sequence[Adapted],
    cast: _Cast,
    x: Tensor,
    u: Tensor,
) -> tuple[Tensor, list[Tensor], list[Tensor | None]]:
    """dL/du, dL/dA_i = (dL/du_i)^T x and dL/dB_i = s_i (dL/dy_i)^T u_i, those in their own dtype.

    A layer whose output nothing was computed from has no dL/dB_i.
    """
    ranks = _ranks(group)
    sizes = [one.A.numel() for one in group] + [one.B.numel() for one in group]
    flat = u.new_empty(sum(sizes))
    pieces = flat.split_with_sizes(sizes)
    grad_u = torch.empty_like(u)
    us, grad_us = (t.split_with_sizes(ranks, 1) for t in (u, grad_u))
    parts = zip(grads, us, grad_us, group, cast.Bs, pieces[len(group) :], strict=True)
    for grad, part, grad_part, one, B, grad_B in parts:
        if grad is None:
            grad_part.zero_()
        else:
            _scaled_product(grad, B, one.scaling, out=grad_part)
            _scaled_product(grad.T, part, one.scaling, out=grad_B.view(one.B.shape))
    torch.mm(grad_u.T, x, out=flat[: cast.A.numel()].view(cast.A.shape))
    found = flat.to(group[0].A.dtype).split_with_sizes(sizes)
    grad_As = [grad.view(one.A.shape) for grad, one in zip(found, group, strict=False)]
    grad_Bs = [
        None if grad is None else mine.view(one.B.shape)
        for grad, mine, one in zip(grads, found[len(group) :], group, strict=True)
    ]
    return grad_u, grad_As, grad_Bs


def _of_input(grads: Sequence[Tensor | None], group: Sequence[Adapted]) -> Tensor | None:
    """Sum of dL/dy_i W_i, (tokens, in_features); turned back once for all of a rotation."""
    totals: dict[int, Tensor] = {}
    for grad, one in zip(grads, group, strict=True):
        if grad is not None:
            block = _rotation(one)
            totals[block] = add_gradient(totals.get(block), grad, one.layer)
    total = totals.pop(0, None)
    for block, turned in totals.items():
        mine = direct(hadamard, turned)(turned, block, True)
        total = mine if total is None else total.add_(mine)
    return total


def _turned(x: Tensor, group: Sequence[Adapted]) -> dict[int, Tensor]:
    """x in the bases that weights are stored in, by block of the rotation; 0 = its own."""
    blocks = {_rotation(one) for one in group}
    return {block: direct(hadamard, x)(x, block, False) if block else x for block in blocks}


def _rotation(one: Adapted) -> int:
    """Block of the rotation of a layer's inputs; 0 = none."""
    return one.layer.spec.rotation if isinstance(one.layer, QuantLinear) else 0


def _output(x: Tensor, u: Tensor, one: Adapted, B: Tensor, bias: Tensor | None) -> Tensor:
    y = product(x, one.layer, bias)
    y.view(-1, y.shape[-1]).addmm_(u, B.T, alpha=one.scaling)
    return y


@torch.no_grad()
def _cast(group: Sequence[Adapted], dtype: torch.dtype) -> _Cast:
    As = [one.A for one in group]
    others = [one.B for one in group] + [one.layer.bias for one in group]
    A, to, of = As[0], [], []
    if len(As) > 1 or A.dtype != dtype:
        A = A.new_empty((sum(_ranks(group)), A.shape[1]), dtype=dtype)
        to, of = list(A.split_with_sizes(_ranks(group))), As
    found = [
        t if t is None or t.dtype == dtype else torch.empty_like(t, dtype=dtype) for t in others
    ]
    changed = [(new, old) for new, old in zip(found, others, strict=True) if new is not old]
    to, of = [*to, *(new for new, _ in changed)], [*of, *(old for _, old in changed)]
    if to:
        torch._foreach_copy_(to, of)
    return _Cast(A, found[: len(group)], found[len(group) :])


def _scaled_product(a: Tensor, b: Tensor, scaling: float, *, out: Tensor) -> None:
    """out = s a b."""
    torch.addmm(out, a, b, beta=0, alpha=scaling, out=out)


def _ranks(group: Sequence[Adapted]) -> list[int]:
    return [one.A.shape[0] for one in group]


def _versions(group: tuple[Adapted, ...]) -> list[tuple[int, int]]:
    return [(one.A._version, one.B._version) for one in group]


def _rows(x: Tensor) -> Tensor:
    return x.reshape(-1, x.shape[-1])
