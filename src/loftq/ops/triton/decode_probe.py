"""Trial of the kernels of a decoded token against plain PyTorch, on the machine itself."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import rms_norm, scaled_dot_product_attention, silu

from loftq.ops.triton.decode_attention import attend, rotate_and_store
from loftq.ops.triton.decode_norm import add_norm, swiglu

HEADS, KV_HEADS, LENGTH, DIM = 4, 2, 192, 64
POSITION = 150


def decoding_is_right(device: torch.device) -> bool:
    """Whether each kernel gives PyTorch's values within float16's rounding for a small layer."""
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to(device, torch.float16)

    x, delta, weight = draw(2, 192), draw(2, 192), draw(192)
    total, normed = add_norm(x, delta, weight, 1e-6)
    pairs = [(total, x + delta), (normed, rms_norm(x + delta, (192,), weight, 1e-6))]
    pairs.append((swiglu(x), silu(x[:, :96]) * x[:, 96:]))

    qkv, cos, sin = draw(2, (HEADS + 2 * KV_HEADS) * DIM), draw(DIM), draw(DIM)
    keys, values = draw(2, KV_HEADS, LENGTH, DIM), draw(2, KV_HEADS, LENGTH, DIM)
    position = torch.tensor(POSITION, device=device)
    q = rotate_and_store(qkv, None, cos, sin, None, keys, values, position)
    heads = qkv.view(2, -1, DIM)
    turned = torch.cat((-heads[..., DIM // 2 :], heads[..., : DIM // 2]), -1)
    rotated = heads * cos + turned * sin
    pairs.append((q, rotated[:, :HEADS]))
    pairs.append((keys[:, :, POSITION], rotated[:, HEADS : HEADS + KV_HEADS]))
    pairs.append((values[:, :, POSITION], heads[:, HEADS + KV_HEADS :]))
    there = POSITION + 1
    wanted = scaled_dot_product_attention(
        q[:, :, None], keys[:, :, :there], values[:, :, :there], scale=0.125, enable_gqa=True
    )
    pairs.append((attend(q, keys, values, position, 0.125), wanted.reshape(2, -1)))
    return all(torch.allclose(a, b, rtol=0.02, atol=0.02) for a, b in pairs)
