"""A block of columns rounded one after the other in one launch: GPTQ and coordinate descent.

Computes `columns.round_columns_reference` and `columns.descend_columns_reference` bit for bit. A
program holds some rows of the block in registers, (BLOCK_ROWS, BLOCK_COLUMNS), and walks through
its columns: take column j out of the tile, code it, and take what that did off the tile by one
rank-1 update with row j of the factor, which all programs read from cache. Rows are independent.
The walk is a chain of dependent steps, so it should be bound by their latency (not measured yet),
where plain PyTorch starts some fifteen kernels for each column.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from loftq.ops.columns import LEAST_SCALE
from loftq.ops.triton.grid import nearest

BLOCK_WEIGHTS = 512  # of a tile: few rows for each program, so that one matrix fills a large GPU
WARPS = 1  # of a program: a column is then taken out by shuffles, without a barrier
STRIDES = ("scale_stack", "scale_row", "scale_column", "zero_stack", "zero_row", "zero_column")
"""Arguments that the code does not depend on: scales are read one column at a time, and a kernel
for each way they may lie would take seconds to compile."""


@triton.jit(do_not_specialize=STRIDES)
def _round_columns(  # type: ignore[no-untyped-def]  # arguments are Triton's
    w_ptr, factor_ptr, scale_ptr, zero_ptr, levels_ptr, codes_ptr, values_ptr, errors_ptr,
    rows, width, tiny, top, scale_stack, scale_row, scale_column, zero_stack, zero_row, zero_column,
    LEVELS: tl.constexpr, BLOCK_ROWS: tl.constexpr, BLOCK_COLUMNS: tl.constexpr,
):  # fmt: skip
    n = tl.program_id(1).to(tl.int64)
    row = tl.program_id(0).to(tl.int64) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    column = tl.arange(0, BLOCK_COLUMNS)
    within = row < rows
    inside = within[:, None] & (column < width)[None, :]
    at = (n * rows + row)[:, None] * width + column[None, :]  # (BLOCK_ROWS, BLOCK_COLUMNS)
    tile = tl.load(w_ptr + at, inside, 0.0)
    codes = tl.zeros(tile.shape, tl.int32)
    values, errors = tl.zeros_like(tile), tl.zeros_like(tile)
    factor_ptr += n * width * width
    scales = scale_ptr + n * scale_stack + row * scale_row
    zeros = zero_ptr + n * zero_stack + row * zero_row
    for j in range(width):
        here = (column == j)[None, :]
        w = tl.sum(tl.where(here, tile, 0.0), 1)  # (BLOCK_ROWS,)
        scale = tl.load(scales + j * scale_column, within, 1.0)
        zero = tl.load(zeros + j * zero_column, within, 0.0)
        code, value = nearest(w, scale, zero, levels_ptr, tiny, top, LEVELS)
        pivot = tl.load(factor_ptr + j * width + j)
        error = tl.div_rn(w - value, pivot + tl.zeros_like(w))
        along = tl.load(factor_ptr + j * width + column, column < width, 0.0)  # (BLOCK_COLUMNS,)
        tile = tile - error[:, None] * along[None, :]
        codes = tl.where(here, code[:, None], codes)
        values = tl.where(here, value[:, None], values)
        errors = tl.where(here, error[:, None], errors)
    tl.store(codes_ptr + at, codes.to(tl.uint8), inside)
    tl.store(values_ptr + at, values, inside)
    tl.store(errors_ptr + at, errors, inside)


@triton.jit(do_not_specialize=STRIDES)
def _descend_columns(  # type: ignore[no-untyped-def]  # arguments are Triton's
    q_ptr, pull_ptr, gram_ptr, scale_ptr, zero_ptr, levels_ptr, codes_ptr, values_ptr,
    rows, width, tiny, top, scale_stack, scale_row, scale_column, zero_stack, zero_row, zero_column,
    LEVELS: tl.constexpr, BLOCK_ROWS: tl.constexpr, BLOCK_COLUMNS: tl.constexpr,
):  # fmt: skip
    n = tl.program_id(1).to(tl.int64)
    row = tl.program_id(0).to(tl.int64) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    column = tl.arange(0, BLOCK_COLUMNS)
    within = row < rows
    inside = within[:, None] & (column < width)[None, :]
    at = (n * rows + row)[:, None] * width + column[None, :]  # (BLOCK_ROWS, BLOCK_COLUMNS)
    old = tl.load(q_ptr + at, inside, 0.0)
    pull = tl.load(pull_ptr + at, inside, 0.0)
    codes, values = tl.zeros(old.shape, tl.int32), old
    gram_ptr += n * width * width
    scales = scale_ptr + n * scale_stack + row * scale_row
    zeros = zero_ptr + n * zero_stack + row * zero_row
    for j in range(width):
        here = (column == j)[None, :]
        q = tl.sum(tl.where(here, old, 0.0), 1)  # (BLOCK_ROWS,)
        towards = tl.sum(tl.where(here, pull, 0.0), 1)
        scale = tl.load(scales + j * scale_column, within, 1.0)
        zero = tl.load(zeros + j * zero_column, within, 0.0)
        pivot = tl.load(gram_ptr + j * width + j)
        wanted = q + tl.div_rn(towards, pivot + tl.zeros_like(q))
        code, value = nearest(wanted, scale, zero, levels_ptr, tiny, top, LEVELS)
        along = tl.load(gram_ptr + j * width + column, column < width, 0.0)  # (BLOCK_COLUMNS,)
        pull = pull - (value - q)[:, None] * along[None, :]
        codes = tl.where(here, code[:, None], codes)
        values = tl.where(here, value[:, None], values)
    tl.store(codes_ptr + at, codes.to(tl.uint8), inside)
    tl.store(values_ptr + at, values, inside)


def round_columns(
    W: Tensor,
    factor: Tensor,
    scales: Tensor,
    zeros: Tensor | None,
    levels: Tensor | None,
    top: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """The kernel of `schema.round_columns`, whose arguments it takes."""
    W = W.contiguous()
    codes = torch.empty_like(W, dtype=torch.uint8)
    values, errors = torch.empty_like(W), torch.empty_like(W)
    inputs, outputs = (W, factor.contiguous()), (codes, values, errors)
    _launch(_round_columns, inputs, outputs, scales, zeros, levels, top)
    return codes, values, errors


def descend_columns(
    Q: Tensor,
    G: Tensor,
    gram: Tensor,
    scales: Tensor,
    zeros: Tensor | None,
    levels: Tensor | None,
    top: int,
) -> tuple[Tensor, Tensor]:
    """The kernel of `schema.descend_columns`, whose arguments it takes."""
    Q = Q.contiguous()
    codes, values = torch.empty_like(Q, dtype=torch.uint8), torch.empty_like(Q)
    inputs = (Q, G.contiguous(), gram.contiguous())
    _launch(_descend_columns, inputs, (codes, values), scales, zeros, levels, top)
    return codes, values


def _launch(
    kernel: Any,
    inputs: tuple[Tensor, ...],
    outputs: tuple[Tensor, ...],
    scales: Tensor,
    zeros: Tensor | None,
    levels: Tensor | None,
    top: int,
) -> None:
    """Start a kernel over the rows of a stack; scales and zeros are read where they are."""
    n, rows, width = inputs[0].shape
    scales = scales.expand(inputs[0].shape)
    zeros = scales if zeros is None else zeros.expand(inputs[0].shape)
    block_columns = triton.next_power_of_2(width)
    block_rows = max(1, BLOCK_WEIGHTS // block_columns)
    with torch.cuda.device_of(inputs[0]):
        kernel[(triton.cdiv(rows, block_rows), n)](
            *inputs, scales, zeros, scales if levels is None else levels, *outputs,
            rows, width, LEAST_SCALE, float(top), *scales.stride(), *zeros.stride(),
            LEVELS=0 if levels is None else len(levels),
            BLOCK_ROWS=block_rows, BLOCK_COLUMNS=block_columns, num_warps=WARPS,
            enable_fp_fusion=False,
        )  # fmt: skip
