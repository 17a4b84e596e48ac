"""A trial of the few-token product: assembly and layouts are checked on the machine itself.

One 16 x 64 weight a width, whose rows hold every code, against the portable decode.
"""

from __future__ import annotations

import torch

from loftq.ops.triton.linear import small_linear


def levels_are_right(device: torch.device) -> bool:
    """Whether the fast decode gives the portable one's values for 4, 3 and 2 bits."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(3, 64, generator=generator).to(device, torch.bfloat16)
    scale = torch.full((16, 1), 1.0).view(torch.uint8).to(device)
    for bits in (4, 3, 2):
        packed = torch.randint(0, 256, (16, 8 * bits), generator=generator, dtype=torch.uint8)
        levels = torch.linspace(-1, 1, 2**bits).tolist()
        arguments = (x, packed.to(device), scale, None, None, bits, 64, "f32", levels, 0.0)
        fast, slow = (small_linear(*arguments, portable=portable) for portable in (False, True))
        if not torch.allclose(fast, slow, rtol=0.05, atol=0.05):  # both round to bfloat16
            return False
    return True
