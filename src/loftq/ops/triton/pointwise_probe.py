"""Trial of norm, rotation and gate of the training layer against plain PyTorch, on the machine."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from loftq.ops import pointwise_reference as reference
from loftq.ops.triton import pointwise

TOLERANCE = 1e-4
"""Of float32 values of size one: sums of 64 in another order, and other exponentials."""


def pointwise_is_right(device: torch.device) -> bool:
    """Whether each kernel, forward and backward, gives the reference's values in float32."""
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to(device)

    x, grad, weight = draw(3, 64), draw(3, 64), draw(64)
    heads, cos, sin = draw(2, 3, 5, 16), draw(1, 5, 16), draw(1, 5, 16)
    calls: list[tuple[str, tuple[Any, ...]]] = [
        ("rms_norm", (x, weight, 1e-5, 1.0)),
        ("rms_norm_backward", (grad, x, weight, 1e-5, 1.0)),
        ("rotate", (heads, cos, sin, False)),
        ("rotate", (heads, cos, sin, True)),
    ]
    for activation in reference.ACTIVATIONS:
        calls += [("gate", (x, grad, activation)), ("gate_backward", (grad, x, grad, activation))]
    return _overwrites(x, grad) and all(
        _same(getattr(pointwise, name)(*given), getattr(reference, f"{name}_reference")(*given))
        for name, given in calls
    )


def _overwrites(x: Tensor, grad: Tensor) -> bool:
    """Whether the gate's gradients, written over its inputs, are those written beside them."""
    gate, up = x.clone(), grad.clone()
    pointwise.gate_backward_(grad, gate, up, "silu")
    return _same((gate, up), reference.gate_backward_reference(grad, x, grad, "silu"))


def _same(found: Tensor | tuple[Tensor, ...], wanted: Tensor | tuple[Tensor, ...]) -> bool:
    if isinstance(found, Tensor) or isinstance(wanted, Tensor):
        found, wanted = (found,), (wanted,)  # type: ignore[assignment]
    pairs = zip(found, wanted, strict=True)
    return all(torch.allclose(a, b, rtol=TOLERANCE, atol=TOLERANCE) for a, b in pairs)
