"""The zero of a group that makes its codes say most: information-calibrated quantization.

IR-QLoRA (Qin et al., arXiv:2402.05445, section 3.2) takes a shift tau off a group before it is
rounded, scales what is left by its largest absolute value, and chooses tau by the entropy of the
codes q:

    tau = argmax H(q),   H = - sum_v p_v log2 p_v,   p_v = share of the group with code v.

Here the shift is what a format stores, the whole number z of w = s (q - z), so that all there are
can be tried (the paper scans 100 real ones about the median). z puts the middle of the 2^bits cells
at tau = s (top / 2 - z), and the largest |w - tau| meets their edge, 2 max|w - tau| = s (top + 1):

    s(z) = max(high / (top - z + 1/2), -low / (z + 1/2))

is the smallest scale under which no weight is further than s / 2 from a level. Of equal entropies
the one with the smaller squared error is taken. Worked case, 2 bits: for (-1, 0, 1, 2) z = 1 gives
s = 4/5 and each code once, H = 2 bits; z = 2 gives s = 4/3, codes (1, 2, 3, 3) and H = 3/2.
"""

from __future__ import annotations

import torch
from torch import Tensor

from loftq.ops.columns import LEAST_SCALE


def most_informative(x: Tensor, top: int) -> tuple[Tensor, Tensor]:
    """Scale and zero of each row whose codes have the largest entropy.

    Args:
        x: (rows, columns) float32, a row a group.
        top: largest code.

    Returns:
        (s (rows,) > 0, z (rows,) whole numbers in 0..top), float32.
    """
    low, high = x.amin(-1), x.amax(-1)
    scale, zero = torch.empty_like(low), torch.empty_like(low)
    best = torch.full_like(low, -torch.inf)
    least = torch.full_like(low, torch.inf)
    for z in range(top + 1):
        s = torch.maximum(high / (top - z + 0.5), -low / (z + 0.5)).clamp_min_(LEAST_SCALE)
        codes = (x / s[:, None] + z).round_().clamp_(0, top)
        error = (x - (codes - z) * s[:, None]).square_().sum(-1)
        bits = entropy(codes, top)
        better = (bits > best) | ((bits == best) & (error < least))
        best, least = torch.where(better, bits, best), torch.where(better, error, least)
        scale, zero = torch.where(better, s, scale), torch.where(better, z, zero)
    return scale, zero


def entropy(codes: Tensor, top: int) -> Tensor:
    """Bits that a code of each row carries, (rows,) float32; rows of whole numbers in 0..top."""
    counts = codes.new_zeros(len(codes), top + 1)
    counts.scatter_add_(1, codes.long(), torch.ones_like(codes))
    return torch.special.entr(counts / codes.shape[-1]).sum(-1) / torch.log(codes.new_tensor(2.0))
