"""What a decoder layer does between its linear layers for one new token of each sequence.

Each function is defined here in plain PyTorch (norm, rotation and gate by pointwise_reference.py,
as in training); on a GPU a Triton kernel computes it in one or two launches (triton/decode_norm.py,
triton/decode_attention.py). For inference: no gradient, and nothing for `torch.compile`. With
`overlap` a launch starts while the one before it ends (triton/overlap.py); the caller has asked
`may_overlap`.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from loftq.ops.dispatch import why_no_decode_kernels
from loftq.ops.pointwise_reference import gate_reference, rms_norm_reference, rotate_reference


def add_norm(
    x: Tensor, delta: Tensor | None, weight: Tensor, eps: float, *, overlap: bool = False
) -> tuple[Tensor, Tensor]:
    """(h, g * h / sqrt(mean(h^2) + eps)) for h = x + delta: residual and RMSNorm.

    Args:
        x: residual stream (tokens, hidden).
        delta: output of the layer before, likewise; None = 0.
        weight: g (hidden,).
        eps: of the mean square, which is taken in float32.
        overlap: see above.
    """
    if not why_no_decode_kernels(x):
        from loftq.ops.triton import decode_norm

        return decode_norm.add_norm(x, delta, weight, eps, overlap=overlap)
    total = x if delta is None else x + delta
    return total, rms_norm_reference(total, weight, eps, 0.0)


def swiglu(x: Tensor, *, overlap: bool = False) -> Tensor:
    """silu(gate) * up for x = [gate, up] (tokens, 2 n): (tokens, n)."""
    if not why_no_decode_kernels(x):
        from loftq.ops.triton import decode_norm

        return decode_norm.swiglu(x, overlap=overlap)
    gate, up = x.chunk(2, -1)
    return gate_reference(gate, up, "silu")


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
    """Rotary embedding of the queries and keys; keys and values go to their place in the cache.

        rotate(u) = u cos + [-u_2, u_1] sin,   u = [u_1, u_2]

    Args:
        x: [q, k, v] of one token a sequence, (tokens, (heads + 2 kv_heads) * dim).
        bias: added to x, or None.
        cos, sin: of the token's position, (dim,).
        norms: RMSNorm weights (dim,) of queries and keys before the rotation, and eps; or None.
        keys, values: cache (tokens, kv_heads, length, dim), contiguous; row `position` is written.
        position: int64, one element.
        overlap: see above.

    Returns:
        Queries (tokens, heads, dim).
    """
    if not why_no_decode_kernels(x):
        from loftq.ops.triton import decode_attention

        return decode_attention.rotate_and_store(
            x, bias, cos, sin, norms, keys, values, position, overlap=overlap
        )
    kv_heads, dim = keys.shape[1], keys.shape[3]
    heads = (x if bias is None else x + bias).view(x.shape[0], -1, 1, dim)
    q, k, v = heads.split([heads.shape[1] - 2 * kv_heads, kv_heads, kv_heads], 1)
    if norms is not None:
        q = rms_norm_reference(q, norms[0], norms[2], 0.0)
        k = rms_norm_reference(k, norms[1], norms[2], 0.0)
    q, k = (rotate_reference(u, cos[None, None], sin[None, None], False) for u in (q, k))
    keys.index_copy_(2, position.view(1), k.to(keys.dtype))
    values.index_copy_(2, position.view(1), v.to(values.dtype))
    return q[:, :, 0]


def attend(
    q: Tensor,
    keys: Tensor,
    values: Tensor,
    position: Tensor,
    scaling: float,
    *,
    overlap: bool = False,
) -> Tensor:
    """softmax(scaling q k^T) v over positions 0 .. `position` of the cache.

    Args:
        q: (tokens, heads, dim), heads a multiple of kv_heads.
        keys, values: (tokens, kv_heads, length, dim), contiguous.
        position: int64, one element: of the newest token.
        scaling: of the scores.
        overlap: see above.

    Returns:
        (tokens, heads * dim).
    """
    if not why_no_decode_kernels(q):
        from loftq.ops.triton import decode_attention

        return decode_attention.attend(q, keys, values, position, scaling, overlap=overlap)
    there = torch.arange(keys.shape[2], device=q.device) <= position
    y = scaled_dot_product_attention(
        q[:, :, None], keys, values, attn_mask=there[None, None, None], scale=scaling,
        enable_gqa=q.shape[1] != keys.shape[1],
    )  # fmt: skip
    return y.reshape(q.shape[0], -1)
