"""Packed tensors handed to the library: products of a few tokens, and the weight itself.

A structure holds nothing but addresses and sizes, so it is made once for each set of them and stays
right whatever becomes of the tensors; those of a call live as long as the call.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from functools import lru_cache

import torch
from torch import Tensor

from loftq.ops.cpu.library import (
    DTYPES,
    Adapter,
    Library,
    Projection,
    Team,
    Weight,
    make_weight,
    ready,
)
from loftq.ops.reference import dynamic_map_on

CPU = torch.device("cpu")


def small_linear(
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
    lora_A: Tensor | None = None,
    lora_B: Tensor | None = None,
    scaling: float = 1.0,
) -> Tensor:
    """x @ W^T, or x @ W^T + scaling * (x @ A^T) @ B^T, in x's dtype.

    Sums are float32; a weight is never rounded to x's dtype. The result does not depend on the
    number of threads, and that of a token not on the tokens beside it.

    Args:
        x: (tokens, in_features) float32, float16 or bfloat16; the rest as in `schema.quant_linear`.
        lora_A: (rank, in_features) of any of those dtypes, with lora_B (out_features, rank).
        scaling: of the adapter.
    """
    library, team = ready()
    y = x.new_empty((x.shape[0], packed.shape[0]))
    parts = [
        None if part is None else part.to(torch.uint8).contiguous()
        for part in (packed, scale, zero, nested)
    ]
    layout = (bits, group_size, scale_coding, tuple(levels), default_zero)
    adapter = NO_ADAPTER if lora_A is None else adapter_key(lora_A, lora_B, scaling)
    projection = make_projection(parts, x.shape[1], layout, adapter)
    run_projections(library, team, (projection,), x, y)
    return y


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
    """Weights (out_features, in_features) in `dtype`, to the bit those of the reference."""
    if dtype not in DTYPES:
        out = dequantize(
            packed, scale, zero, nested, in_features, bits, group_size, scale_coding, levels,
            default_zero, torch.float32,
        )  # fmt: skip
        return out.to(dtype)
    library, team = ready()
    out = torch.empty((packed.shape[0], in_features), dtype=dtype)
    # Mixed-precision wrappers may have cast the bytes; 0..255 survive any float dtype we meet.
    parts = [
        None if part is None else part.to(torch.uint8).contiguous()
        for part in (packed, scale, zero, nested)
    ]
    if out.numel():
        layout = (bits, group_size, scale_coding, tuple(levels), default_zero)
        weight = _weight(_pointers(parts), (out.shape[0], in_features), *layout)
        library.check(
            library.functions.loftq_dequantize(
                ctypes.byref(team), ctypes.byref(weight), DTYPES[dtype], out.data_ptr()
            )
        )
    return out


def make_projection(
    parts: Sequence[Tensor | None],
    in_features: int,
    layout: tuple,
    adapter: tuple,
    bias: Tensor | None = None,
) -> Projection:
    """What the library knows of one linear layer; `parts` are its packed tensors in order."""
    codes = parts[0]
    assert codes is not None
    weight = (_pointers(parts), (codes.shape[0], in_features), *layout)
    added = (None, 0) if bias is None else (bias.data_ptr(), DTYPES[bias.dtype])
    return _projection(weight, adapter, added)


def run_projections(
    library: Library, team: Team, projections: Sequence[Projection], x: Tensor, y: Tensor
) -> None:
    """Fill y (tokens, sum of out_features) from x (tokens, in_features), both of one dtype."""
    if not y.numel():
        return
    x = x.contiguous()
    first = projections[0]
    if len(projections) > 1:
        first = (Projection * len(projections))(*projections)  # type: ignore[assignment]
    library.check(
        library.functions.loftq_project(
            ctypes.byref(team), ctypes.byref(first), len(projections),
            x.data_ptr(), x.shape[0], DTYPES[x.dtype], y.data_ptr(),
        )
    )  # fmt: skip


NO_ADAPTER = (None, None, 0, 0, 0.0)


def adapter_key(lora_A: Tensor, lora_B: Tensor | None, scaling: float) -> tuple:
    assert lora_B is not None
    rank = lora_A.shape[0]
    return lora_A.data_ptr(), lora_B.data_ptr(), rank, DTYPES[lora_A.dtype], scaling


def _pointers(parts: Sequence[Tensor | None]) -> tuple[int | None, ...]:
    found = [None if part is None else part.data_ptr() for part in parts]
    return (*found, dynamic_map_on(CPU).data_ptr())


@lru_cache(maxsize=4096)
def _weight(pointers: tuple, shape: tuple[int, int], *layout: object) -> Weight:
    return make_weight(pointers, shape, *layout)  # type: ignore[arg-type]


@lru_cache(maxsize=4096)
def _projection(weight: tuple, adapter: tuple, bias: tuple) -> Projection:
    return Projection(_weight(*weight), Adapter(*adapter), *bias)
