# mypy: disable-error-code="assignment,unreachable"
"""Between two linear layers of a decoded token: residual + RMSNorm, and SwiGLU.

Both read and write some ten thousand values: the bound is the launch. Definitions: ops/decoding.py.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from loftq.ops.triton.overlap import before_a_product


@triton.jit
def _add_norm(  # type: ignore[no-untyped-def]
    x_ptr, delta_ptr, weight_ptr, sum_ptr, y_ptr, columns, eps,
    ADD: tl.constexpr, BLOCK: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    TYPE: tl.constexpr = x_ptr.dtype.element_ty
    column = tl.arange(0, BLOCK)
    inside = column < columns
    weight = tl.load(weight_ptr + column, inside, 0.0)
    if OVERLAP == 2:
        gdc_launch_dependents()
    if OVERLAP:
        gdc_wait()
    place = tl.program_id(0).to(tl.int64) * columns + column  # (BLOCK,)
    x = tl.load(x_ptr + place, inside, 0.0).to(tl.float32)
    if ADD:
        x = (x + tl.load(delta_ptr + place, inside, 0.0).to(tl.float32)).to(TYPE)
        tl.store(sum_ptr + place, x, inside)
        x = x.to(tl.float32)
    if OVERLAP == 1:
        gdc_launch_dependents()
    mean = tl.sum(x * x, 0) / columns
    y = (x * tl.rsqrt(mean + eps)).to(TYPE).to(tl.float32) * weight.to(tl.float32)
    tl.store(y_ptr + place, y.to(TYPE), inside)


@triton.jit
def _swiglu(  # type: ignore[no-untyped-def]
    x_ptr, y_ptr, columns, BLOCK: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    TYPE: tl.constexpr = x_ptr.dtype.element_ty
    if OVERLAP == 2:
        gdc_launch_dependents()
    if OVERLAP:
        gdc_wait()
    column = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = column < columns
    token = tl.program_id(1).to(tl.int64)
    gate = tl.load(x_ptr + token * (2 * columns) + column, inside, 0.0).to(tl.float32)
    up = tl.load(x_ptr + token * (2 * columns) + columns + column, inside, 0.0).to(tl.float32)
    if OVERLAP == 1:
        gdc_launch_dependents()
    y = (gate / (1.0 + tl.exp(-gate))).to(TYPE).to(tl.float32) * up
    tl.store(y_ptr + token * columns + column, y.to(TYPE), inside)


def add_norm(
    x: Tensor, delta: Tensor | None, weight: Tensor, eps: float, *, overlap: bool = False
) -> tuple[Tensor, Tensor]:
    """`decoding.add_norm` for contiguous tensors; a program per token."""
    tokens, columns = x.shape
    total, y = x if delta is None else torch.empty_like(x), torch.empty_like(x)
    with torch.cuda.device_of(x):
        _add_norm[(tokens,)](
            x, x if delta is None else delta, weight, total, y, columns, eps,
            ADD=delta is not None, BLOCK=triton.next_power_of_2(columns), num_warps=8,
            **before_a_product(overlap),
        )  # fmt: skip
    return total, y


def swiglu(x: Tensor, *, overlap: bool = False) -> Tensor:
    """`decoding.swiglu` for a contiguous tensor."""
    tokens, columns = x.shape[0], x.shape[1] // 2
    y = torch.empty((tokens, columns), dtype=x.dtype, device=x.device)
    with torch.cuda.device_of(x):
        _swiglu[(triton.cdiv(columns, 512), tokens)](
            x, y, columns, BLOCK=512, num_warps=4, **before_a_product(overlap)
        )
    return y
