"""Operators between the products of a block, with their gradients: norm, rotation, gate.

Each is one pass over memory on a GPU where stock code takes four to ten, and keeps only its inputs
for the backward. Weights of norms are frozen: no gradient is computed for them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from loftq.ops import pointwise_reference as reference
from loftq.ops.direct import differentiable, direct
from loftq.ops.dispatch import pointwise_kernels


def _run(name: str, x: Tensor, *, whole_rows: bool = False) -> Callable[..., Any]:
    kernels = pointwise_kernels(x, whole_rows=whole_rows)
    return getattr(kernels, name) if kernels else getattr(reference, f"{name}_reference")


@torch.library.custom_op("loftq::rms_norm", mutates_args=())
def rms_norm(x: Tensor, weight: Tensor, eps: float, offset: float) -> Tensor:
    """(offset + w) * x / sqrt(mean x^2 + eps) over the last dimension, in x's dtype.

    Args:
        x: (..., columns).
        weight: (columns,), frozen; any float dtype.
        eps: below the root.
        offset: 0, or 1 where the weight is stored as its distance from 1 (Gemma).
    """
    return _run("rms_norm", x, whole_rows=True)(x, weight, eps, offset)


@rms_norm.register_fake
def _(x: Tensor, weight: Tensor, eps: float, offset: float) -> Tensor:
    return x.new_empty(x.shape)


@torch.library.custom_op("loftq::rms_norm_backward", mutates_args=())
def rms_norm_backward(grad: Tensor, x: Tensor, weight: Tensor, eps: float, offset: float) -> Tensor:
    """dL/dx of `rms_norm` from dL/dy and its inputs."""
    return _run("rms_norm_backward", x, whole_rows=True)(grad, x, weight, eps, offset)


@rms_norm_backward.register_fake
def _(grad: Tensor, x: Tensor, weight: Tensor, eps: float, offset: float) -> Tensor:
    return x.new_empty(x.shape)


@torch.library.custom_op("loftq::rotate", mutates_args=())
def rotate(x: Tensor, cos: Tensor, sin: Tensor, inverse: bool = False) -> Tensor:
    """Rotary embedding of x (batch, heads, tokens, width); its halves are the two coordinates.

    Args:
        x: any strides with a dense last dimension; the result has the same.
        cos, sin: (batch or 1, tokens, width), not trained.
        inverse: the transposed map, which is the gradient's.
    """
    return _run("rotate", x)(x, cos, sin, inverse)


@rotate.register_fake
def _(x: Tensor, cos: Tensor, sin: Tensor, inverse: bool = False) -> Tensor:
    return torch.empty_like(x)


@torch.library.custom_op("loftq::gate", mutates_args=())
def gate(gate: Tensor, up: Tensor, activation: str) -> Tensor:
    """act(gate) * up, elementwise.

    Args:
        gate, up: of one shape and dtype.
        activation: "silu", "gelu" or "gelu_tanh".
    """
    return _run("gate", gate)(gate, up, activation)


@gate.register_fake
def _(gate: Tensor, up: Tensor, activation: str) -> Tensor:
    return gate.new_empty(gate.shape)


@torch.library.custom_op("loftq::gate_backward", mutates_args=())
def gate_backward(grad: Tensor, gate: Tensor, up: Tensor, activation: str) -> tuple[Tensor, Tensor]:
    """(dL/dgate, dL/dup) of `gate`."""
    return _run("gate_backward", gate)(grad, gate, up, activation)


@gate_backward.register_fake
def _(grad: Tensor, gate: Tensor, up: Tensor, activation: str) -> tuple[Tensor, Tensor]:
    return gate.new_empty(gate.shape), gate.new_empty(gate.shape)


@torch.library.custom_op("loftq::gate_backward_", mutates_args=("gate", "up"))
def gate_backward_(grad: Tensor, gate: Tensor, up: Tensor, activation: str) -> None:
    """`gate_backward` written over gate and up, which are contiguous."""
    if kernels := pointwise_kernels(gate):
        kernels.gate_backward_(grad, gate, up, activation)
        return
    for to, found in zip(
        (gate, up), reference.gate_backward_reference(grad, gate, up, activation), strict=True
    ):
        to.copy_(found)


class _GateOnce(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate_: Tensor, up: Tensor, activation: str) -> Tensor:
        ctx.save_for_backward(gate_, up)
        ctx.activation, ctx.spent = activation, False
        y: Tensor = direct(gate, gate_)(gate_, up, activation)
        return y

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        if ctx.spent:
            raise RuntimeError(
                "the training layer goes backward through a gate once, since it writes the "
                "gradients over its inputs: leave retain_graph=True out, or train with fused=False."
            )
        ctx.spent = True
        found = [tensor.detach() for tensor in ctx.saved_tensors]
        direct(gate_backward_, grad)(grad, *found, ctx.activation)
        return *found, None


def call_gate_once(gate: Tensor, up: Tensor, activation: str) -> Tensor:
    """`gate`, whose backward writes the gradients over gate and up: memory for two tensors less.

    Args:
        gate, up: contiguous, and nobody else's: neither kept nor read after this call.
        activation: as of `gate`.
    """
    y: Tensor = _GateOnce.apply(gate, up, activation)
    return y


def _save_norm(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, ctx.weight, *ctx.shape = inputs
    ctx.save_for_backward(x)
    ctx.x = None


def _norm_gradient(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    x, ctx.x = _unpacked(ctx), None
    return direct(rms_norm_backward, grad)(grad, x, ctx.weight, *ctx.shape), None, None, None


def _unpacked(node: Any) -> Tensor:
    """x of a norm, until its backward: checkpointing unpacks it but once."""
    if node.x is None:
        (node.x,) = node.saved_tensors
    x: Tensor = node.x
    return x


def _save_rotation(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, cos, sin, ctx.inverse = inputs
    ctx.save_for_backward(cos, sin)


def _rotation_gradient(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    return direct(rotate, grad)(grad, *ctx.saved_tensors, not ctx.inverse), None, None, None


def _save_gate(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    gate, up, ctx.activation = inputs
    ctx.save_for_backward(gate, up)


def _gate_gradient(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    return *direct(gate_backward, grad)(grad, *ctx.saved_tensors, ctx.activation), None


rms_norm.register_autograd(_norm_gradient, setup_context=_save_norm)


class _NormNode(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float, offset: float) -> Tensor:
        y: Tensor = direct(rms_norm, x)(x, weight, eps, offset)
        _save_norm(ctx, (x, weight, eps, offset), y)
        return y

    backward = staticmethod(_norm_gradient)


def call_rms_norm(x: Tensor, weight: Tensor, eps: float, offset: float) -> Tensor:
    """`rms_norm`, whose node can compute the output once more (`norm_again`)."""
    y: Tensor = _NormNode.apply(x, weight, eps, offset)
    return y


def norm_behind(x: Tensor) -> Any:
    """The node of the `call_rms_norm` that x is the output of, or None."""
    node = x.grad_fn
    return node if getattr(node, "_forward_cls", None) is _NormNode else None


def norm_again(node: Any) -> Tensor:
    """Output of a norm from the input that its node keeps; before the node's own backward."""
    x = _unpacked(node)
    y: Tensor = direct(rms_norm, x)(x, node.weight, *node.shape)
    return y


call_rotate = differentiable(rotate, _save_rotation, _rotation_gradient)
"""`rotate`, without the dispatcher where nobody looks; all arguments by position."""
call_gate = differentiable(gate, _save_gate, _gate_gradient)
"""`gate` likewise."""
