"""Codes to bytes. The inverse, `unpack_codes`, is part of the layout's definition in `ops`."""

from __future__ import annotations

import torch
from torch import Tensor

from loftq.ops.dispatch import pack_kernel
from loftq.ops.reference import planes, row_bytes, unpack_codes

__all__ = ["pack_codes", "unpack_codes"]


def pack_codes(codes: Tensor, bits: int) -> Tensor:
    """Packed rows (..., row_bytes) uint8 from codes (..., in_features) uint8 below 2^bits.

    Low bits first: at 4 bits byte k holds code 2k in its low nibble and 2k + 1 in its high one. At
    3 bits the low two bits of the row come first, four to a byte, then its high bits, eight to a
    byte. Each plane is padded with zero bits to whole bytes.
    """
    if kernel := pack_kernel(codes):
        return kernel(codes, bits, row_bytes(codes.shape[-1], bits))
    parts, shift = [], 0
    for width in planes(bits):
        per_byte = 8 // width
        plane = (codes >> shift) & (2**width - 1)
        plane = torch.nn.functional.pad(plane, (0, -codes.shape[-1] % per_byte))
        plane = plane.unflatten(-1, (-1, per_byte))
        packed = plane[..., 0].clone()
        for k in range(1, per_byte):
            packed |= plane[..., k] << (k * width)
        parts.append(packed)
        shift += width
    return torch.cat(parts, -1) if len(parts) > 1 else parts[0]
