"""What lies between the products of a block, in plain PyTorch: norm, rotation, gated activation.

The definition that the kernels of training (ops/triton/pointwise.py) and of decoding
(ops/triton/decode_norm.py, decode_attention.py) are held to: float32 inside (float64 for float64),
rounded once to the dtype of the input.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
}
"""Activations of a gate by name."""


def rms_norm_reference(x: Tensor, weight: Tensor, eps: float, offset: float) -> Tensor:
    """(offset + w) * x / sqrt(mean x^2 + eps) over the last dimension."""
    return ((_wide(weight) + offset) * _normed(x, eps)[0]).to(x.dtype)


def rms_norm_backward_reference(
    grad: Tensor, x: Tensor, weight: Tensor, eps: float, offset: float
) -> Tensor:
    """(h - n mean(h n)) / r, with r = sqrt(mean x^2 + eps), n = x / r, h = dL/dy (offset + w)."""
    n, inverse = _normed(x, eps)
    h = _wide(grad) * (_wide(weight) + offset)
    return (inverse * (h - n * (h * n).mean(-1, keepdim=True))).to(x.dtype)


def rotate_reference(x: Tensor, cos: Tensor, sin: Tensor, inverse: bool) -> Tensor:
    """Rotary embedding of x (batch, heads, tokens, width), its halves being the two coordinates.

        [y1, y2] = [x1 cos1 - x2 sin1, x2 cos2 + x1 sin2]; `inverse` applies the transposed map.

    Args:
        x: queries or keys.
        cos, sin: (batch or 1, tokens, width).
        inverse: the gradient's way.
    """
    x1, x2 = _wide(x).chunk(2, -1)
    c1, c2 = _wide(cos).unsqueeze(1).chunk(2, -1)
    s1, s2 = _wide(sin).unsqueeze(1).chunk(2, -1)
    if inverse:
        halves = (x1 * c1 + x2 * s2, x2 * c2 - x1 * s1)
    else:
        halves = (x1 * c1 - x2 * s1, x2 * c2 + x1 * s2)
    return torch.empty_like(x).copy_(torch.cat(halves, -1))


def gate_reference(gate: Tensor, up: Tensor, activation: str) -> Tensor:
    """act(gate) * up."""
    return (ACTIVATIONS[activation](_wide(gate)) * _wide(up)).to(gate.dtype)


def gate_backward_reference(
    grad: Tensor, gate: Tensor, up: Tensor, activation: str
) -> tuple[Tensor, Tensor]:
    """(dL/dgate, dL/dup) of act(gate) * up."""
    g, value = _wide(gate), _wide(grad)
    grad_gate = value * _wide(up) * _slope(g, activation)
    return grad_gate.to(gate.dtype), (value * ACTIVATIONS[activation](g)).to(up.dtype)


def _wide(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


def _normed(x: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    wide = _wide(x)
    inverse = torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)
    return wide * inverse, inverse


def _slope(x: Tensor, activation: str) -> Tensor:
    """d act / dx."""
    if activation == "silu":
        s = torch.sigmoid(x)
        return s * (1 + x * (1 - s))
    if activation == "gelu":
        density = torch.exp(-0.5 * x * x) / math.sqrt(2 * math.pi)
        return 0.5 * (1 + torch.erf(x / math.sqrt(2))) + x * density
    t = torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))
    inner = math.sqrt(2 / math.pi) * (1 + 3 * 0.044715 * x * x)
    return 0.5 * (1 + t) + 0.5 * x * (1 - t * t) * inner
