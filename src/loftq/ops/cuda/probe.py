"""A trial of the few-token product: compiler, driver and card are checked on the machine itself.

One 64 x 128 weight a width, with an adapter, against the reference in float32.
"""

from __future__ import annotations

import torch

from loftq.ops.cuda.few_tokens import few_tokens
from loftq.ops.reference import dequantize_reference


def why_wrong(device: torch.device) -> str:
    """ "" if the product is right for 4, 3 and 2 bits, else what came out."""
    generator = torch.Generator().manual_seed(0)
    x, A, B = (
        torch.randn(shape, generator=generator).to(device, torch.bfloat16)
        for shape in ((3, 128), (8, 128), (64, 8))
    )
    scale = torch.rand(64, 2, generator=generator).view(torch.uint8).to(device)
    for bits in (4, 3, 2):
        packed = torch.randint(0, 256, (64, 16 * bits), generator=generator, dtype=torch.uint8)
        levels = torch.linspace(-1, 1, 2**bits).tolist()
        packed = packed.to(device)
        y = few_tokens(x, packed, scale, None, None, bits, 64, "f32", levels, 0.0, A, B, 0.5)
        W = dequantize_reference(
            packed, scale, None, None, 128, bits, 64, "f32", levels, 0.0, torch.float32
        )
        wanted = x.float() @ W.T + 0.5 * (x.float() @ A.float().T) @ B.float().T
        error = ((y.float() - wanted).norm() / wanted.norm()).item()
        if not error < 0.02:  # bfloat16 rounds to 0.004
            return f"a trial at {bits} bits is off by {error:.3g} of its norm: report it"
    return ""
