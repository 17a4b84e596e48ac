"""Trials of kernels: assembly, layouts and compiler are checked on the machine itself.

Each compares a small problem with the portable decode or with plain PyTorch.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from loftq.ops.columns import descend_columns_reference, round_columns_reference
from loftq.ops.triton.columns import descend_columns, round_columns
from loftq.ops.triton.dequantize import dequantize
from loftq.ops.triton.linear import small_linear
from loftq.ops.triton.many_tokens import many_tokens_linear
from loftq.ops.triton.scale_search import search_integer_scales

SHARE = 0.98
"""Of the results that must agree: a sum in another order may tip a value that lies between two."""


def levels_are_right(device: torch.device) -> bool:
    """Whether the fast decode gives the portable one's values for 4, 3 and 2 bits.

    One 16 x 64 weight a width, whose rows hold every code.
    """
    x = torch.randn(3, 64, generator=torch.Generator().manual_seed(0)).to(device, torch.bfloat16)
    for bits in (4, 3, 2):
        arguments = (x, *_random_packed(16, 64, bits, device))
        fast, slow = (small_linear(*arguments, portable=portable) for portable in (False, True))
        if not torch.allclose(fast, slow, rtol=0.05, atol=0.05):  # both round to bfloat16
            return False
    return True


def many_tokens_are_right(device: torch.device) -> bool:
    """Whether the fused product of 200 tokens gives the dense one's values for 4, 3 and 2 bits."""
    x = torch.randn(200, 192, generator=torch.Generator().manual_seed(0)).to(device, torch.bfloat16)
    for bits in (4, 3, 2):
        arguments = _random_packed(160, 192, bits, device)
        tensors, layout = arguments[:4], arguments[4:]
        weight = dequantize(*(*tensors, 192, *layout, x.dtype))
        found = many_tokens_linear(x, *tensors, *layout)
        if not torch.allclose(found, x @ weight.T, rtol=0.05, atol=0.1):
            return False
    return True


def _random_packed(rows: int, columns: int, bits: int, device: torch.device) -> tuple:
    """A weight of all codes, groups of 64 and scales of 1: the operators' arguments after x."""
    generator = torch.Generator().manual_seed(bits)
    size = (rows, columns // 8 * bits)
    packed = torch.randint(0, 256, size, generator=generator, dtype=torch.uint8).to(device)
    scale = torch.full((rows, columns // 64), 1.0).view(torch.uint8).to(device)
    levels = torch.linspace(-1, 1, 2**bits).tolist()
    return packed, scale, None, None, bits, 64, "f32", levels, 0.0


def columns_are_right(device: torch.device) -> bool:
    """Whether sweeps over a block of 32 x 64 give the codes and values of the reference."""
    generator = torch.Generator().manual_seed(0)
    W, G = torch.randn(2, 1, 32, 64, generator=generator).to(device)
    x = torch.randn(256, 64, generator=generator).to(device)
    gram = (x.mT @ x / 256 + 0.01 * torch.eye(64, device=device))[None]
    factor = torch.linalg.cholesky(torch.linalg.inv(gram)).mT.contiguous()
    scales = (0.5 + torch.rand(1, 32, 1, generator=generator)).to(device)
    grids = (
        (scales, None, torch.linspace(-1, 1, 4, device=device), 3),
        (scales, torch.full_like(scales, 2), None, 3),
    )
    return all(
        _agree(kernel(*inputs, *grid), reference(*inputs, *grid))
        for grid in grids
        for kernel, reference, inputs in (
            (round_columns, round_columns_reference, (W, factor)),
            (descend_columns, descend_columns_reference, (W, G, gram)),
        )
    )


def integer_search_is_right(device: torch.device) -> bool:
    """Whether the search of scale and zero leaves the errors of a plain search over 64 groups."""
    x = torch.randn(64, 64, generator=torch.Generator().manual_seed(0)).to(device)
    low, high = x.amin(-1), x.amax(-1)
    widest = (high - low) / 3
    zeros = (-low / widest).round()
    ratios = torch.tensor([0.6, 0.8, 1.0], device=device)
    found = search_integer_scales(x, widest, zeros, ratios, top=3, shifts=1)
    tried = [_squared_error(x, widest * ratio, zeros) for ratio in ratios]
    return _agree([_squared_error(x, *found)], [torch.stack(tried).amin(0)])


def _squared_error(x: Tensor, scales: Tensor, zeros: Tensor) -> Tensor:
    s, z = scales[:, None], zeros[:, None]
    return (x - ((x / s + z).round().clamp(0, 3) - z) * s).square().sum(-1)


def _agree(found: Iterable[Tensor], wanted: Iterable[Tensor]) -> bool:
    return all(
        torch.isclose(a.float(), b.float(), rtol=1e-3, atol=1e-4).float().mean().item() >= SHARE
        for a, b in zip(found, wanted, strict=True)
    )
