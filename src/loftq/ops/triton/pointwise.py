"""Norm, rotation and gated activation, forward and backward, each in one pass over memory.

Bound by memory: every element of the inputs is read once, every element of the result written once.
Arithmetic is float32; values are rounded once, to the dtype of the result. The norm's backward
computes the root again from the row that it holds anyway, so nothing but x is kept for it.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK = 4096
"""Elements of one program of the norm and the gate."""


@triton.jit
def _rms_norm(  # type: ignore[no-untyped-def]  # arguments are Triton's
    x_ptr, weight_ptr, grad_ptr, out_ptr, rows, columns, eps, offset,
    BACKWARD: tl.constexpr, BLOCK_ROWS: tl.constexpr, BLOCK_COLUMNS: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    column = tl.arange(0, BLOCK_COLUMNS)
    inside = (row < rows)[:, None] & (column < columns)[None, :]
    at = row[:, None] * columns + column[None, :]  # (BLOCK_ROWS, BLOCK_COLUMNS)
    x = tl.load(x_ptr + at, inside, 0.0).to(tl.float32)
    w = tl.load(weight_ptr + column, column < columns, 0.0).to(tl.float32)[None, :] + offset
    inverse = tl.rsqrt(tl.sum(x * x, 1) / columns + eps)[:, None]
    n = x * inverse
    if BACKWARD:
        h = tl.load(grad_ptr + at, inside, 0.0).to(tl.float32) * w
        y = inverse * (h - n * (tl.sum(h * n, 1) / columns)[:, None])
    else:
        y = n * w
    tl.store(out_ptr + at, y.to(out_ptr.dtype.element_ty), inside)


def _norm(x: Tensor, weight: Tensor, grad: Tensor | None, eps: float, offset: float) -> Tensor:
    x = x.contiguous()
    out = torch.empty_like(x)
    columns = x.shape[-1]
    if not x.numel():
        return out
    rows, block = x.numel() // columns, triton.next_power_of_2(columns)
    block_rows = max(1, BLOCK // block)
    with torch.cuda.device_of(x):
        _rms_norm[(triton.cdiv(rows, block_rows),)](
            x, weight.contiguous(), x if grad is None else grad.contiguous(), out,
            rows, columns, eps, offset,
            BACKWARD=grad is not None, BLOCK_ROWS=block_rows, BLOCK_COLUMNS=block,
            num_warps=8 if block_rows * block >= BLOCK else 4,
        )  # fmt: skip
    return out


def rms_norm(x: Tensor, weight: Tensor, eps: float, offset: float) -> Tensor:
    """As `pointwise_reference.rms_norm_reference`."""
    return _norm(x, weight, None, eps, offset)


def rms_norm_backward(grad: Tensor, x: Tensor, weight: Tensor, eps: float, offset: float) -> Tensor:
    """As `pointwise_reference.rms_norm_backward_reference`."""
    return _norm(x, weight, grad, eps, offset)


@triton.jit
def _rotate(  # type: ignore[no-untyped-def]  # arguments are Triton's
    x_ptr, cos_ptr, sin_ptr, out_ptr, tokens, heads, half,
    x_batch, x_head, x_token, out_batch, out_head, out_token, table_batch,
    INVERSE: tl.constexpr, BLOCK_HEADS: tl.constexpr, BLOCK_HALF: tl.constexpr,
):  # fmt: skip
    place = tl.program_id(0).to(tl.int64)
    batch, token = place // tokens, place % tokens
    head = tl.program_id(1) * BLOCK_HEADS + tl.arange(0, BLOCK_HEADS)
    lane = tl.arange(0, BLOCK_HALF)
    table = batch * table_batch + token * (2 * half) + lane
    here = lane < half
    c1 = tl.load(cos_ptr + table, here, 0.0).to(tl.float32)[None, :]
    c2 = tl.load(cos_ptr + table + half, here, 0.0).to(tl.float32)[None, :]
    s1 = tl.load(sin_ptr + table, here, 0.0).to(tl.float32)[None, :]
    s2 = tl.load(sin_ptr + table + half, here, 0.0).to(tl.float32)[None, :]
    inside = (head < heads)[:, None] & here[None, :]
    at = batch * x_batch + token * x_token + head.to(tl.int64)[:, None] * x_head + lane[None, :]
    x1 = tl.load(x_ptr + at, inside, 0.0).to(tl.float32)  # (BLOCK_HEADS, BLOCK_HALF)
    x2 = tl.load(x_ptr + at + half, inside, 0.0).to(tl.float32)
    if INVERSE:
        y1, y2 = x1 * c1 + x2 * s2, x2 * c2 - x1 * s1
    else:
        y1, y2 = x1 * c1 - x2 * s1, x2 * c2 + x1 * s2
    to = batch * out_batch + token * out_token + head.to(tl.int64)[:, None] * out_head
    to += lane[None, :]
    tl.store(out_ptr + to, y1.to(out_ptr.dtype.element_ty), inside)
    tl.store(out_ptr + to + half, y2.to(out_ptr.dtype.element_ty), inside)


def rotate(x: Tensor, cos: Tensor, sin: Tensor, inverse: bool) -> Tensor:
    """As `pointwise_reference.rotate_reference`."""
    batch, heads, tokens, width = x.shape
    x = x if x.stride(-1) == 1 else x.contiguous()
    out = torch.empty_like(x)
    if not x.numel():
        return out
    cos, sin = cos.contiguous(), sin.contiguous()
    half = width // 2
    block_half = triton.next_power_of_2(half)
    block_heads = min(triton.next_power_of_2(heads), max(1, 2048 // block_half))
    table_batch = 0 if len(cos) == 1 else tokens * width
    with torch.cuda.device_of(x):
        _rotate[(batch * tokens, triton.cdiv(heads, block_heads))](
            x, cos, sin, out, tokens, heads, half, *x.stride()[:3], *out.stride()[:3], table_batch,
            INVERSE=inverse, BLOCK_HEADS=block_heads, BLOCK_HALF=block_half,
        )  # fmt: skip
    return out


@triton.jit
def _act(x, ACTIVATION: tl.constexpr):  # type: ignore[no-untyped-def]  # arguments are Triton's
    """(act(x), its slope), in float32."""
    if ACTIVATION == "silu":
        s = tl.sigmoid(x)
        value = x * s
        slope = s * (1 + x * (1 - s))
    elif ACTIVATION == "gelu":
        p = 0.5 * (1 + tl.erf(x * 0.7071067811865476))
        value = x * p
        slope = p + x * tl.exp(-0.5 * x * x) * 0.3989422804014327
    else:
        inner = 0.7978845608028654 * (x + 0.044715 * x * x * x)
        p = tl.sigmoid(2 * inner)  # (1 + tanh) / 2
        value = x * p
        inner_slope = 0.7978845608028654 * (1 + 0.134145 * x * x)
        slope = p + 2 * x * p * tl.sigmoid(-2 * inner) * inner_slope
    return value, slope


@triton.jit
def _gate(  # type: ignore[no-untyped-def]  # arguments are Triton's
    gate_ptr, up_ptr, grad_ptr, out_ptr, up_grad_ptr, count,
    ACTIVATION: tl.constexpr, BACKWARD: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = at < count
    g = tl.load(gate_ptr + at, inside, 0.0).to(tl.float32)
    u = tl.load(up_ptr + at, inside, 0.0).to(tl.float32)
    value, slope = _act(g, ACTIVATION)
    if BACKWARD:
        d = tl.load(grad_ptr + at, inside, 0.0).to(tl.float32)
        tl.store(out_ptr + at, (d * u * slope).to(out_ptr.dtype.element_ty), inside)
        tl.store(up_grad_ptr + at, (d * value).to(up_grad_ptr.dtype.element_ty), inside)
    else:
        tl.store(out_ptr + at, (value * u).to(out_ptr.dtype.element_ty), inside)


def _run_gate(
    gate: Tensor, up: Tensor, grad: Tensor | None, activation: str, out: Tensor, up_grad: Tensor
) -> None:
    if not gate.numel():
        return
    with torch.cuda.device_of(gate):
        _gate[(triton.cdiv(gate.numel(), BLOCK),)](
            gate, up, gate if grad is None else grad.contiguous(), out, up_grad, gate.numel(),
            ACTIVATION=activation, BACKWARD=grad is not None, BLOCK=BLOCK, num_warps=8,
        )  # fmt: skip


def gate(gate: Tensor, up: Tensor, activation: str) -> Tensor:
    """As `pointwise_reference.gate_reference`."""
    gate, up = gate.contiguous(), up.contiguous()
    out = torch.empty_like(gate)
    _run_gate(gate, up, None, activation, out, out)
    return out


def gate_backward(grad: Tensor, gate: Tensor, up: Tensor, activation: str) -> tuple[Tensor, Tensor]:
    """As `pointwise_reference.gate_backward_reference`."""
    gate, up = gate.contiguous(), up.contiguous()
    found = torch.empty_like(gate), torch.empty_like(up)
    _run_gate(gate, up, grad, activation, *found)
    return found


def gate_backward_(grad: Tensor, gate: Tensor, up: Tensor, activation: str) -> None:
    """The same written over gate and up, which are contiguous: each element is read by the program
    that writes it, before."""
    _run_gate(gate, up, grad, activation, gate, up)
