"""What a module of a foreign model computes, found out by trying its class on a few numbers."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from types import FunctionType
from typing import Any

import torch
from torch import Tensor, nn

from loftq.ops import pointwise
from loftq.ops.pointwise_reference import ACTIVATIONS, rms_norm_reference, rotate_reference

OFFSETS = (0.0, 1.0)
"""What a norm may add to its weight."""
EPS_NAMES = ("variance_epsilon", "eps")
TRIAL_EPS = 0.03
ROTARY = "apply_rotary_pos_emb"
CLOSE = 1e-5


def norm_of(module: nn.Module) -> tuple[float, float] | None:
    """(eps, offset) of a module that computes ops.pointwise.rms_norm; None if it does not."""
    weights = dict(module.named_parameters())
    if list(weights) != ["weight"] or weights["weight"].dim() != 1:
        return None
    offset = _norm_offset(type(module))  # type: ignore[arg-type]
    eps = [getattr(module, name) for name in EPS_NAMES if hasattr(module, name)]
    if offset is None or len(eps) != 1 or not isinstance(eps[0], float):
        return None
    return eps[0], offset


@lru_cache
def _norm_offset(kind: type[nn.Module]) -> float | None:
    with torch.device("cpu"):
        try:
            norm = kind(8, eps=TRIAL_EPS)
            norm.weight.data.copy_(torch.linspace(-1, 2, 8))  # type: ignore[operator]
            x = _numbers(3, 8)
            found = norm(x)
        except Exception:  # a foreign class that wants something else
            return None
        for offset in OFFSETS:
            if _same(found, rms_norm_reference(x, norm.weight, TRIAL_EPS, offset)):  # type: ignore[arg-type]
                return offset
    return None


def activation_of(module: nn.Module) -> str | None:
    """Name of the activation of an MLP that computes down(act(gate(x)) * up(x)); else None."""
    parts = ("gate_proj", "up_proj", "down_proj", "act_fn")
    if not all(
        isinstance(getattr(module, part, None), (nn.Module, FunctionType)) for part in parts
    ):
        return None
    act: Any = module.act_fn
    x = torch.linspace(-5, 5, 41, device="cpu")
    with torch.no_grad():
        names = [name for name, known in ACTIVATIONS.items() if _same(act(x), known(x))]
    return names[0] if len(names) == 1 and _is_gated(type(module), act) else None


@torch.no_grad()
def _is_gated(kind: type[nn.Module], act: Any) -> bool:
    trial: Any = kind.__new__(kind)
    nn.Module.__init__(trial)
    trial.act_fn = act
    gate, up, down = _numbers(6, 4), _numbers(6, 4).cos(), _numbers(4, 6).sin()
    for name, weight in (("gate_proj", gate), ("up_proj", up), ("down_proj", down)):
        layer = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
        layer.weight = nn.Parameter(weight)
        setattr(trial, name, layer)
    x = _numbers(3, 4)
    try:
        found = kind.forward(trial, x)
    except Exception:  # a foreign class that reads something else of itself
        return False
    return _same(found, (act(x @ gate.T) * (x @ up.T)) @ down.T)


@lru_cache
def rotary_forward(kind: type[nn.Module]) -> Callable[..., Any] | None:
    """The forward of an attention class with its rotary embedding in one kernel; None if it has
    another kind of rotary embedding, or none.

    It is the class's own code; only the name of the rotary function means another one in it.
    """
    forward: Any = kind.forward
    if not isinstance(forward, FunctionType) or ROTARY not in forward.__code__.co_names:
        return None
    stock = forward.__globals__.get(ROTARY)
    if stock is None or hasattr(forward, "__wrapped__") or not _is_rotary(stock):
        return None
    names = {**forward.__globals__, ROTARY: _Rotation(stock)}
    made = FunctionType(
        forward.__code__, names, forward.__name__, forward.__defaults__, forward.__closure__
    )
    made.__kwdefaults__ = forward.__kwdefaults__
    return made


def _is_rotary(stock: Callable[..., Any]) -> bool:
    q, k = _numbers(2, 4, 3, 8), _numbers(2, 2, 3, 8).cos()
    cos, sin = _numbers(2, 3, 8).sin(), _numbers(2, 3, 8).cos()
    try:
        found = stock(q, k, cos, sin)
    except Exception:  # a foreign function that wants something else
        return False
    wanted = [rotate_reference(x, cos, sin, False) for x in (q, k)]
    return len(found) == 2 and all(map(_same, found, wanted))


class _Rotation:
    """In the place of a model's rotary function; hands over to it what it does not compute."""

    def __init__(self, stock: Callable[..., Any]) -> None:
        self.stock = stock

    def __call__(
        self, q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        plain = not (args or kwargs or torch.compiler.is_compiling())
        like = q.dtype == k.dtype == cos.dtype == sin.dtype and cos.shape[-1] == q.shape[-1]
        if not (plain and like and q.dim() == 4 and cos.dim() == 3):
            return self.stock(q, k, cos, sin, *args, **kwargs)
        return pointwise.call_rotate(q, cos, sin, False), pointwise.call_rotate(k, cos, sin, False)


def _numbers(*shape: int) -> Tensor:
    count = torch.Size(shape).numel()
    return torch.linspace(-2, 3, count, device="cpu").sin().mul(1.7).reshape(shape)


def _same(found: Any, wanted: Tensor) -> bool:
    if not isinstance(found, Tensor) or found.shape != wanted.shape:
        return False
    return torch.allclose(found, wanted, rtol=CLOSE, atol=CLOSE)
