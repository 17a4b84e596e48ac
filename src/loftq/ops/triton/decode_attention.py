# mypy: disable-error-code="assignment,unreachable"
"""Attention of one new token per sequence: rotary embedding, the cache's new row, and the sums.

Bound: one read of the keys and values that are there. The context is split among programs
(flash-decoding), each keeps its maximum, sum and weighted values in float32, a second small kernel
joins them in one order. How much is there is read on the device, so that one captured graph serves
every step. Definitions: ops/decoding.py.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from loftq.ops.triton.overlap import before_a_product, options

BLOCK = 64  # positions at a time
PROGRAMS = 264  # aimed at: two for each multiprocessor of an H100
QUERIES = 16  # rows of the matrix instruction; query heads of one key head, padded


@triton.jit
def _normalise(first, second, weight_ptr, d, eps, HALF: tl.constexpr, TYPE: tl.constexpr):  # type: ignore[no-untyped-def]
    mean = (tl.sum(first * first, 0) + tl.sum(second * second, 0)) / (2 * HALF)
    factor = tl.rsqrt(mean + eps)
    first = (first * factor).to(TYPE).to(tl.float32) * tl.load(weight_ptr + d).to(tl.float32)
    second = (second * factor).to(TYPE).to(tl.float32)
    second = second * tl.load(weight_ptr + HALF + d).to(tl.float32)
    return first.to(TYPE).to(tl.float32), second.to(TYPE).to(tl.float32)


@triton.jit
def _rotate(  # type: ignore[no-untyped-def]
    x_ptr, bias_ptr, cos_ptr, sin_ptr, q_norm_ptr, k_norm_ptr, q_ptr, keys_ptr, values_ptr,
    position_ptr, eps, length, HEADS: tl.constexpr, KV_HEADS: tl.constexpr, HALF: tl.constexpr,
    BIAS: tl.constexpr, NORM: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    """Program (token, head): of q, then k, then v."""
    TYPE: tl.constexpr = x_ptr.dtype.element_ty
    if OVERLAP:
        gdc_wait()
    token, head = tl.program_id(0).to(tl.int64), tl.program_id(1)
    d = tl.arange(0, HALF)
    at = head * (2 * HALF) + d
    from_ptr = x_ptr + token * ((HEADS + 2 * KV_HEADS) * 2 * HALF)
    first = tl.load(from_ptr + at).to(tl.float32)
    second = tl.load(from_ptr + HALF + at).to(tl.float32)
    if BIAS:
        first = (first + tl.load(bias_ptr + at).to(tl.float32)).to(TYPE).to(tl.float32)
        second = (second + tl.load(bias_ptr + HALF + at).to(tl.float32)).to(TYPE).to(tl.float32)
    row = token * KV_HEADS * length + tl.load(position_ptr)  # of key head 0 in the cache
    if head < HEADS + KV_HEADS:
        if NORM:
            norm_ptr = tl.where(head < HEADS, q_norm_ptr, k_norm_ptr)
            first, second = _normalise(first, second, norm_ptr, d, eps, HALF, TYPE)
        cos, sin = tl.load(cos_ptr + d).to(tl.float32), tl.load(sin_ptr + d).to(tl.float32)
        cos_2 = tl.load(cos_ptr + HALF + d).to(tl.float32)
        sin_2 = tl.load(sin_ptr + HALF + d).to(tl.float32)
        first, second = first * cos - second * sin, second * cos_2 + first * sin_2
    if OVERLAP:
        gdc_launch_dependents()
    if head < HEADS:
        to_ptr = q_ptr + token * (HEADS * 2 * HALF) + head * (2 * HALF)
    else:
        cache_ptr = tl.where(head < HEADS + KV_HEADS, keys_ptr, values_ptr)
        to_ptr = cache_ptr + (row + (head - HEADS) % KV_HEADS * length) * (2 * HALF)
    tl.store(to_ptr + d, first.to(TYPE))
    tl.store(to_ptr + HALF + d, second.to(TYPE))


@triton.jit
def _attend(  # type: ignore[no-untyped-def]
    q_ptr, keys_ptr, values_ptr, position_ptr, part_ptr, most_ptr, sum_ptr, scaling, length,
    GROUP: tl.constexpr, QUERIES: tl.constexpr, DIM: tl.constexpr, BLOCK: tl.constexpr,
    SPLITS: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    """Program (token and key head, split): its share of the positions for GROUP query heads."""
    TYPE: tl.constexpr = q_ptr.dtype.element_ty
    if OVERLAP:
        gdc_wait()
    head, split = tl.program_id(0), tl.program_id(1)  # token * key heads + key head
    there = (tl.load(position_ptr) + 1).to(tl.int32)
    share = tl.cdiv(tl.cdiv(there, BLOCK), SPLITS) * BLOCK
    start, end = split * share, tl.minimum(split * share + share, there)
    d, n, g = tl.arange(0, DIM), tl.arange(0, BLOCK), tl.arange(0, QUERIES)
    real = g < GROUP
    query = head * GROUP + g
    q = tl.load(q_ptr + query[:, None] * DIM + d[None, :], real[:, None], 0.0)  # (QUERIES, DIM)
    base = head.to(tl.int64) * length * DIM
    most = tl.full((QUERIES,), float("-inf"), tl.float32)
    total = tl.zeros((QUERIES,), tl.float32)
    acc = tl.zeros((QUERIES, DIM), tl.float32)
    for first in tl.range(start, end, BLOCK):
        at = first + n
        inside = at < end
        place = base + at[:, None].to(tl.int64) * DIM + d[None, :]
        k = tl.load(keys_ptr + place, inside[:, None], 0.0)  # (BLOCK, DIM)
        v = tl.load(values_ptr + place, inside[:, None], 0.0)
        scores = tl.dot(q, tl.trans(k)) * scaling  # (QUERIES, BLOCK)
        scores = tl.where(inside[None, :], scores, float("-inf"))
        higher = tl.maximum(most, tl.max(scores, 1))
        weights = tl.exp(scores - higher[:, None])
        shrink = tl.exp(most - higher)
        total = total * shrink + tl.sum(weights, 1)
        acc = acc * shrink[:, None] + tl.dot(weights.to(TYPE), v)
        most = higher
    if OVERLAP:
        gdc_launch_dependents()
    place = query * SPLITS + split
    tl.store(most_ptr + place, most, real)
    tl.store(sum_ptr + place, total, real)
    tl.store(part_ptr + place[:, None] * DIM + d[None, :], acc, real[:, None])


@triton.jit
def _join(  # type: ignore[no-untyped-def]
    part_ptr, most_ptr, sum_ptr, y_ptr,
    DIM: tl.constexpr, SPLITS: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    """Program: one query head. A split without positions has the maximum -inf."""
    if OVERLAP == 2:
        gdc_launch_dependents()
    if OVERLAP:
        gdc_wait()
    query, d, s = tl.program_id(0), tl.arange(0, DIM), tl.arange(0, SPLITS)
    most = tl.load(most_ptr + query * SPLITS + s)  # (SPLITS,)
    weights = tl.exp(most - tl.max(most, 0))
    total = tl.sum(weights * tl.load(sum_ptr + query * SPLITS + s), 0)
    parts = tl.load(part_ptr + (query * SPLITS + s)[:, None] * DIM + d[None, :])
    if OVERLAP == 1:
        gdc_launch_dependents()
    y = tl.sum(weights[:, None] * parts, 0) / total
    tl.store(y_ptr + query * DIM + d, y.to(y_ptr.dtype.element_ty))


def rotate_and_store(
    x: Tensor,
    bias: Tensor | None,
    cos: Tensor,
    sin: Tensor,
    norms: tuple[Tensor, Tensor, float] | None,
    keys: Tensor,
    values: Tensor,
    position: Tensor,
    *,
    overlap: bool = False,
) -> Tensor:
    """`decoding.rotate_and_store`; a program per token and head."""
    tokens, kv_heads, length, dim = keys.shape
    heads = x.shape[1] // dim - 2 * kv_heads
    q = torch.empty((tokens, heads, dim), dtype=x.dtype, device=x.device)
    q_norm, k_norm, eps = norms or (x, x, 0.0)
    with torch.cuda.device_of(x):
        _rotate[(tokens, heads + 2 * kv_heads)](
            x, x if bias is None else bias, cos, sin, q_norm, k_norm, q, keys, values, position,
            eps, length, HEADS=heads, KV_HEADS=kv_heads, HALF=dim // 2, BIAS=bias is not None,
            NORM=norms is not None, num_warps=1, **options(overlap),
        )  # fmt: skip
    return q


def attend(
    q: Tensor,
    keys: Tensor,
    values: Tensor,
    position: Tensor,
    scaling: float,
    *,
    overlap: bool = False,
) -> Tensor:
    """`decoding.attend` for at most QUERIES query heads a key head."""
    tokens, kv_heads, length, dim = keys.shape
    heads = q.shape[1]
    splits = max(1, min(32, triton.next_power_of_2(PROGRAMS // (tokens * kv_heads) + 1) // 2))
    parts = torch.empty((tokens * heads, splits, dim), dtype=torch.float32, device=q.device)
    most, total = torch.empty((2, tokens * heads, splits), dtype=torch.float32, device=q.device)
    y = torch.empty((tokens, heads * dim), dtype=q.dtype, device=q.device)
    with torch.cuda.device_of(q):
        _attend[(tokens * kv_heads, splits)](
            q, keys, values, position, parts, most, total, scaling, length,
            GROUP=heads // kv_heads, QUERIES=QUERIES, DIM=dim, BLOCK=BLOCK, SPLITS=splits,
            num_warps=4, **options(overlap),
        )  # fmt: skip
        _join[(tokens * heads,)](
            parts, most, total, y, DIM=dim, SPLITS=splits, num_warps=2,
            **before_a_product(overlap),
        )  # fmt: skip
    return y
