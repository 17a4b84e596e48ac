"""Operators called without the dispatcher, where nobody looks at the call.

Through the dispatcher a Python operator costs 50 us of the host's time a call, twice that with a
gradient: in a training step of a few thousand tokens, more than the kernels take. What the
dispatcher adds (tracing, fake tensors, modes that count) matters only while one of these is on.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


def is_direct(x: Tensor) -> bool:
    """Whether x is an ordinary tensor and no tracer or mode watches the operators."""
    plain = type(x) is Tensor or type(x) is torch.nn.Parameter
    return plain and not (torch._C._len_torch_dispatch_stack() or torch.compiler.is_compiling())


def direct(operator: Any, x: Tensor) -> Callable[..., Any]:
    """The function behind a `torch.library.custom_op`, or the operator itself where it matters.

    Without a gradient of its own: to be called in the forward or backward of an autograd function.
    """
    return operator._init_fn if is_direct(x) else operator


def differentiable(
    operator: Any, save: Callable[..., None], gradient: Callable[..., Any]
) -> Callable[..., Any]:
    """Give `operator` a gradient, and return what calls it, directly where that is the same.

    Args:
        operator: a `torch.library.custom_op`.
        save: setup_context(ctx, inputs, output) as of `register_autograd`.
        gradient: backward(ctx, *gradients), likewise.
    """
    operator.register_autograd(gradient, setup_context=save)

    def forward(ctx: Any, *inputs: Any) -> Any:
        output = operator._init_fn(*inputs)
        save(ctx, inputs, output)
        return output

    members = {"forward": staticmethod(forward), "backward": staticmethod(gradient)}
    node: Any = type(f"Direct_{operator._name}", (torch.autograd.Function,), members)

    def call(*inputs: Any) -> Any:
        return node.apply(*inputs) if is_direct(inputs[0]) else operator(*inputs)

    return call
