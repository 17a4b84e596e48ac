"""A trial of the CUDA C++ product: compiler, driver and GPU are checked on the machine itself."""

from __future__ import annotations

import torch
from torch import Tensor

from loftq.ops.cuda.few_tokens import few_tokens
from loftq.ops.few_tokens import Member
from loftq.ops.reference import dequantize_reference

COLUMNS, RANK = 512, 16


def product_is_right(device: torch.device, *, tokens: int) -> bool:
    """Whether two weights with adapters give the product of the reference at 4, 3 and 2 bits.

    Args:
        device: with the kernels of few_tokens.cu (up to 16 tokens) or more_tokens.cu.
        tokens: of the product.
    """
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(tokens, COLUMNS, generator=generator).to(device, torch.bfloat16)
    for bits in (4, 3, 2):
        members = [_member(rows, bits, generator, device) for rows in (40, 24)]
        wanted = torch.cat([_product(x, member) for member in members], -1)
        found = few_tokens(x, members, overlap=False)
        if not (found.float() - wanted).norm() <= 0.02 * wanted.norm():  # NaN is wrong too
            return False
    return True


def _member(rows: int, bits: int, generator: torch.Generator, device: torch.device) -> Member:
    size = (rows, COLUMNS * bits // 8)
    packed = torch.randint(0, 256, size, generator=generator, dtype=torch.uint8)
    scale = 0.5 + torch.rand(rows, COLUMNS // 64, generator=generator)
    A, B = (torch.randn(shape, generator=generator) for shape in ((RANK, COLUMNS), (rows, RANK)))
    layout = (bits, 64, "f32", torch.linspace(-1, 1, 2**bits).tolist(), 0.0)
    stored = (packed.to(device), scale.view(torch.uint8).to(device), None, None)
    return Member(*stored, layout, A.to(device).bfloat16(), B.to(device).bfloat16(), 0.5)


def _product(x: Tensor, member: Member) -> Tensor:
    bits, group_size, coding, levels, zero = member.layout
    W = dequantize_reference(
        *member[:4], COLUMNS, bits, group_size, coding, levels, zero, torch.float32
    )
    x = x.float()
    A, B = (t.float() for t in (member.lora_A, member.lora_B) if t is not None)
    return x @ W.T + member.scaling * (x @ A.T) @ B.T
