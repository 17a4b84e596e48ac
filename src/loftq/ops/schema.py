"""Every operator once: signature, checks, fake implementation, autograd; dispatch to the device.

The operators are opaque to `torch.compile`, so a compiled model keeps only packed tensors between
forward and backward: nothing can hoist a dequantized weight into the saved activations.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from loftq.ops.columns import descend_columns_reference, round_columns_reference
from loftq.ops.direct import direct
from loftq.ops.dispatch import (
    dequantize_kernel,
    descend_columns_kernel,
    many_tokens_kernel,
    round_columns_kernel,
    small_linear_kernel,
)
from loftq.ops.panels import Packed, add_product_, panel_rows, panels
from loftq.ops.reference import dequantize_reference


@torch.library.custom_op("loftq::dequantize", mutates_args=())
def dequantize(
    packed: Tensor,
    scale: Tensor,
    zero: Tensor | None,
    nested: Tensor | None,
    in_features: int,
    bits: int,
    group_size: int,
    scale_coding: str,
    levels: Sequence[float],
    default_zero: float,
    dtype: torch.dtype,
) -> Tensor:
    """Weights (out_features, in_features) in `dtype` from the packed tensors of one layer.

    Args:
        packed: codes, uint8 (out_features, row_bytes).
        scale: stored scales, uint8 (out_features, groups * itemsize).
        zero: stored zeros of asymmetric grids, uint8, or None.
        nested: offset and absmax of the nested scale coding, uint8, or None.
        in_features: columns; the last byte of a row may be padding.
        bits: 2, 3, 4 or 8.
        group_size: columns per scale; 0 = a scale per row, -1 = one scale for the tensor.
        scale_coding: "dq", "f16", "bf16" or "f32".
        levels: codebook of 2^bits values, or empty when a code is its own value.
        default_zero: zero of symmetric integer grids (used where `zero` is None).
        dtype: of the result; the arithmetic is float32.
    """
    run = dequantize_kernel(packed, group_size) or dequantize_reference
    return run(
        packed, scale, zero, nested, in_features, bits, group_size, scale_coding, levels,
        default_zero, dtype,
    )  # fmt: skip


@dequantize.register_fake
def _(
    packed: Tensor,
    scale: Tensor,
    zero: Tensor | None,
    nested: Tensor | None,
    in_features: int,
    bits: int,
    group_size: int,
    scale_coding: str,
    levels: Sequence[float],
    default_zero: float,
    dtype: torch.dtype,
) -> Tensor:
    return packed.new_empty((packed.shape[0], in_features), dtype=dtype)


@torch.library.custom_op("loftq::quant_linear", mutates_args=())
def quant_linear(
    x: Tensor,
    packed: Tensor,
    scale: Tensor,
    zero: Tensor | None,
    nested: Tensor | None,
    bits: int,
    group_size: int,
    scale_coding: str,
    levels: Sequence[float],
    default_zero: float,
    inference: bool = False,
) -> Tensor:
    """x @ W^T for a packed W: (..., in_features) -> (..., out_features) in x's dtype.

    With `inference` a few tokens meet the packed bytes, some hundred others of theirs
    (dispatch.why_no_small_linear and why_no_many_tokens say when);
    else the weight is dequantized to x's dtype, a large one by panels of rows (ops/panels.py). The
    gradient flows to x only, and backward dequantizes again instead of keeping the weight.

    Args:
        x: (..., in_features); the other tensors of W as in `dequantize`.
        inference: no gradient is asked of this product, nor of the same one computed again: the two
            paths differ in rounding. The caller's word, because a compiled or checkpointed forward
            runs where `x.requires_grad` no longer tells.
    """
    chosen = (x, packed, bits, group_size)
    if inference and (run := small_linear_kernel(*chosen) or many_tokens_kernel(*chosen)):
        y = run(
            x.reshape(-1, x.shape[-1]), packed, scale, zero, nested, bits, group_size,
            scale_coding, levels, default_zero,
        )  # fmt: skip
        return y.view(*x.shape[:-1], packed.shape[0])
    weight = Packed(
        packed, scale, zero, nested, x.shape[-1], bits, group_size, scale_coding, levels,
        default_zero,
    )  # fmt: skip
    if panel_rows(*_shape(weight), packed.device) == packed.shape[0]:
        return torch.nn.functional.linear(x, direct(dequantize, x)(*weight.arguments, x.dtype))
    y = x.new_empty((*x.shape[:-1], packed.shape[0]))
    rows, inputs = y.view(-1, packed.shape[0]), x.reshape(-1, x.shape[-1])
    for first, panel in panels(weight):
        dense = dequantize(*panel.arguments, x.dtype)
        torch.mm(inputs, dense.T, out=rows[:, first : first + len(dense)])
    return y


@quant_linear.register_fake
def _(
    x: Tensor,
    packed: Tensor,
    scale: Tensor,
    zero: Tensor | None,
    nested: Tensor | None,
    bits: int,
    group_size: int,
    scale_coding: str,
    levels: Sequence[float],
    default_zero: float,
    inference: bool = False,
) -> Tensor:
    return x.new_empty((*x.shape[:-1], packed.shape[0]))


@torch.library.custom_op("loftq::quant_linear_lora", mutates_args=())
def quant_linear_lora(
    x: Tensor,
    packed: Tensor,
    scale: Tensor,
    zero: Tensor | None,
    nested: Tensor | None,
    bits: int,
    group_size: int,
    scale_coding: str,
    levels: Sequence[float],
    default_zero: float,
    lora_A: Tensor,
    lora_B: Tensor,
    scaling: float,
) -> Tensor:
    """x @ W^T + scaling * (x @ A^T) @ B^T in x's dtype; for inference, it has no gradient.

    Args:
        x: (..., in_features); the other tensors of W as in `quant_linear`.
        lora_A: (rank, in_features), any float dtype; used in x's.
        lora_B: (out_features, rank), likewise.
        scaling: alpha / rank, or alpha / sqrt(rank).
    """
    layout = (bits, group_size, scale_coding, levels, default_zero)
    if run := small_linear_kernel(x, packed, bits, group_size):
        y = run(
            x.reshape(-1, x.shape[-1]), packed, scale, zero, nested, *layout, lora_A, lora_B,
            scaling,
        )  # fmt: skip
        return y.view(*x.shape[:-1], packed.shape[0])
    y = quant_linear(x, packed, scale, zero, nested, *layout, True)
    linear = torch.nn.functional.linear
    return y + scaling * linear(linear(x, lora_A.to(x.dtype)), lora_B.to(x.dtype))


@quant_linear_lora.register_fake
def _(
    x: Tensor,
    packed: Tensor,
    scale: Tensor,
    zero: Tensor | None,
    nested: Tensor | None,
    bits: int,
    group_size: int,
    scale_coding: str,
    levels: Sequence[float],
    default_zero: float,
    lora_A: Tensor,
    lora_B: Tensor,
    scaling: float,
) -> Tensor:
    return x.new_empty((*x.shape[:-1], packed.shape[0]))


@torch.library.custom_op("loftq::quant_linear_backward", mutates_args=())
def quant_linear_backward(
    grad: Tensor,
    packed: Tensor,
    scale: Tensor,
    zero: Tensor | None,
    nested: Tensor | None,
    in_features: int,
    bits: int,
    group_size: int,
    scale_coding: str,
    levels: Sequence[float],
    default_zero: float,
) -> Tensor:
    """dL/dx = dL/dy @ W: (..., out_features) -> (..., in_features) in grad's dtype."""
    weight = Packed(
        packed, scale, zero, nested, in_features, bits, group_size, scale_coding, levels,
        default_zero,
    )  # fmt: skip
    if panel_rows(*_shape(weight), packed.device) == packed.shape[0]:
        return grad @ direct(dequantize, grad)(*weight.arguments, grad.dtype)
    rows = grad.reshape(-1, grad.shape[-1])
    total = rows.new_zeros((len(rows), in_features), dtype=torch.float32)
    for first, panel in panels(weight):
        dense = dequantize(*panel.arguments, grad.dtype)
        add_product_(total, rows[:, first : first + len(dense)], dense)
    return total.to(grad.dtype).view(*grad.shape[:-1], in_features)


@quant_linear_backward.register_fake
def _(
    grad: Tensor,
    packed: Tensor,
    scale: Tensor,
    zero: Tensor | None,
    nested: Tensor | None,
    in_features: int,
    bits: int,
    group_size: int,
    scale_coding: str,
    levels: Sequence[float],
    default_zero: float,
) -> Tensor:
    return grad.new_empty((*grad.shape[:-1], in_features))


def _shape(weight: Packed) -> tuple[int, int]:
    return weight.codes.shape[0], weight.in_features


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, packed, scale, zero, nested, *layout, _inference = inputs
    ctx.save_for_backward(packed, scale, zero, nested)
    ctx.in_features, ctx.layout = x.shape[-1], layout


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    grad_x = quant_linear_backward(grad, *ctx.saved_tensors, ctx.in_features, *ctx.layout)
    return grad_x, *[None] * 10


quant_linear.register_autograd(_backward, setup_context=_save)


@torch.library.custom_op("loftq::round_columns", mutates_args=())
def round_columns(
    W: Tensor,
    factor: Tensor,
    scales: Tensor,
    zeros: Tensor | None,
    levels: Tensor | None,
    top: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """GPTQ inside of a block: each column is rounded, its error passed on to those after it.

        e_j = (w_j - q(w_j)) / U_jj,     w_k <- w_k - e_j U_jk for k > j

    Args:
        W: the block, float32 (n, rows, width).
        factor: its diagonal block of the upper factor U, float32 (n, width, width).
        scales: as stored, float32, broadcastable to W.
        zeros: likewise, of an integer grid; else None.
        levels: codebook, float32 (2^bits,) ascending, or None for an integer grid.
        top: largest code of an integer grid.

    Returns:
        (codes uint8, values q float32, errors e float32), each (n, rows, width).
    """
    _check_columns(W, factor, zeros, levels)
    run = round_columns_kernel(W) or round_columns_reference
    return run(W, factor, scales, zeros, levels, top)


@round_columns.register_fake
def _(
    W: Tensor,
    factor: Tensor,
    scales: Tensor,
    zeros: Tensor | None,
    levels: Tensor | None,
    top: int,
) -> tuple[Tensor, Tensor, Tensor]:
    return W.new_empty(W.shape, dtype=torch.uint8), W.new_empty(W.shape), W.new_empty(W.shape)


@torch.library.custom_op("loftq::descend_columns", mutates_args=())
def descend_columns(
    Q: Tensor,
    G: Tensor,
    gram: Tensor,
    scales: Tensor,
    zeros: Tensor | None,
    levels: Tensor | None,
    top: int,
) -> tuple[Tensor, Tensor]:
    """Coordinate descent inside of a block: each column is chosen anew, all others as they stand.

        q'_j = nearest(q_j + G_j / H_jj),     G <- G - (q'_j - q_j) H_j

    Args:
        Q: values of the block, float32 (n, rows, width).
        G: its columns of (W - Q) H, float32 (n, rows, width).
        gram: its diagonal block of H, float32 (n, width, width).
        scales, zeros, levels, top: as in `round_columns`.

    Returns:
        (codes uint8, values q' float32), each (n, rows, width).
    """
    _check_columns(Q, gram, zeros, levels)
    run = descend_columns_kernel(Q) or descend_columns_reference
    return run(Q, G, gram, scales, zeros, levels, top)


@descend_columns.register_fake
def _(
    Q: Tensor,
    G: Tensor,
    gram: Tensor,
    scales: Tensor,
    zeros: Tensor | None,
    levels: Tensor | None,
    top: int,
) -> tuple[Tensor, Tensor]:
    return Q.new_empty(Q.shape, dtype=torch.uint8), Q.new_empty(Q.shape)


def _check_columns(
    block: Tensor, square: Tensor, zeros: Tensor | None, levels: Tensor | None
) -> None:
    n, _, width = block.shape
    if square.shape != (n, width, width) or block.dtype != torch.float32:
        raise ValueError(
            f"a block {tuple(block.shape)} of {block.dtype} meets a matrix {tuple(square.shape)}: "
            f"expected float32 and {(n, width, width)}."
        )
    if (zeros is None) == (levels is None):
        raise ValueError("a grid has either a codebook (levels) or zeros, and not both.")
