"""The rotation of a weight's input side: signs, then a Hadamard matrix on each block of columns.

    R = D (I (x) H_b) / sqrt(b),     x W^T = (x R) (W R)^T,     R R^T = I

D = diag(signs), H_b the Sylvester matrix [[H, H], [H, -H]] of b columns, b a power of two that
divides the width: 576 = 9 * 64 is rotated in blocks of 64. The signs are a fixed function of the
column, so that layers which read one input share its rotation. A product with H_b is what a GPU
does best; at b <= 512 it costs a fraction of the product with W.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

BLOCKS = (16, 32, 64, 128, 256, 512)
"""Columns of a block that a format can name."""
_WORD = 0xFFFFFFFF


@torch.library.custom_op("loftq::hadamard", mutates_args=())
def hadamard(x: Tensor, block: int, inverse: bool) -> Tensor:
    """x R, or x R^T with `inverse`: (..., features) -> the same shape and dtype.

    Computed in x's dtype: products with +-1 are exact, sums are those of a matrix product.

    Args:
        x: (..., features), any float dtype.
        block: b, one of BLOCKS; divides features.
        inverse: R^T in place of R.

    Raises:
        ValueError: features are not whole blocks.
    """
    features = x.shape[-1]
    if block not in BLOCKS or features % block:
        raise ValueError(f"{features} columns are not whole blocks of {block}, one of {BLOCKS}.")
    scaled, H = _constants(features, block, x.dtype, x.device)
    if inverse:
        return (x.unflatten(-1, (-1, block)) @ H).flatten(-2) * scaled
    return ((x * scaled).unflatten(-1, (-1, block)) @ H).flatten(-2)


@hadamard.register_fake
def _(x: Tensor, block: int, inverse: bool) -> Tensor:
    return x.new_empty(x.shape)


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, ctx.block, ctx.inverse = inputs


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    return hadamard(grad, ctx.block, not ctx.inverse), None, None


hadamard.register_autograd(_backward, setup_context=_save)


def column_signs(features: int) -> Tensor:
    """D, (features,) float32 of -1 and 1: the lowest bit of a mixed column number (SPEC.md 7)."""
    mixed = torch.arange(1, features + 1)
    for shift, factor in ((16, 0x7FEB352D), (15, 0x846CA68B)):
        mixed = (mixed ^ (mixed >> shift)) * factor & _WORD  # low bits survive an overflow
    return (1 - 2 * ((mixed ^ (mixed >> 16)) & 1)).float()


def hadamard_matrix(block: int) -> Tensor:
    """H_b, (block, block) float32: (i, j) is -1 where i & j has an odd number of bits, else 1."""
    H = torch.ones(1, 1)
    while len(H) < block:
        H = torch.cat([torch.cat([H, H], 1), torch.cat([H, -H], 1)])
    return H


@lru_cache(maxsize=64)
def _constants(
    features: int, block: int, dtype: torch.dtype, device: torch.device
) -> tuple[Tensor, Tensor]:
    """D / sqrt(b), (features,), and H_b, made once for each device. Read only."""
    with torch.inference_mode(False):
        scaled = column_signs(features).double() * block**-0.5
        return scaled.to(device, dtype), hadamard_matrix(block).to(device, dtype)
