"""Scales to bytes and back. Every residual is formed with the decoded scales, never the fitted."""

from __future__ import annotations

import torch
from torch import Tensor

from loftq.ops.reference import NESTED_RUN, SCALE_DTYPES, decode_scales, dynamic_map_on

__all__ = ["decode_scales", "encode_scales", "round_trip_scales"]


def encode_scales(scales: Tensor, coding: str) -> tuple[Tensor, Tensor | None]:
    """Stored form of one matrix' scales (out_features, groups) float32.

    "dq" is the double quantization of QLoRA (arXiv:2305.14314, section 3) as bitsandbytes stores
    it: the mean is taken off, runs of 256 scales share a float32 absmax, and each scale is the
    nearest entry of the signed dynamic map.

    Returns:
        (bytes (out_features, groups * itemsize) uint8, nested constants uint8 or None).

    Raises:
        ValueError: a scale overflows the coding.
    """
    if coding != "dq":
        stored = scales.to(SCALE_DTYPES[coding])
        if not torch.isfinite(stored).all():
            raise ValueError(
                f"a scale of {scales.abs().max().item():.3g} overflows {coding}; use -bf16, -f32 "
                "or -dq scales for this weight."
            )
        return stored.contiguous().view(torch.uint8), None
    codes, constants = _nest(scales[None])
    return codes[0], constants[0].view(torch.uint8)


def round_trip_scales(scales: Tensor, coding: str) -> Tensor:
    """decode(encode(scales)) of each matrix of a stack (n, out_features, groups), bit for bit."""
    if coding == "f32":
        return scales
    if coding != "dq":
        return decode_scales(encode_scales(scales, coding)[0], None, coding)
    codes, constants = _nest(scales)
    values = dynamic_map_on(scales.device)[codes.flatten(1).long()]
    run = torch.arange(values.shape[1], device=scales.device) // NESTED_RUN
    return (values * constants[:, 1:][:, run] + constants[:, :1]).view(scales.shape)


def _nest(scales: Tensor) -> tuple[Tensor, Tensor]:
    """Codes (n, out_features, groups) uint8 and constants (n, 1 + runs) float32: offset, absmax.

    The mean is taken matrix by matrix: its last bit must not depend on what else is in the stack.
    """
    flat = scales.flatten(1)
    offset = torch.stack([row.mean() for row in flat])[:, None]
    runs = torch.nn.functional.pad(flat - offset, (0, -flat.shape[1] % NESTED_RUN))
    runs = runs.unflatten(1, (-1, NESTED_RUN))
    absmax = runs.abs().amax(-1)
    unit = runs / absmax.clamp_min(torch.finfo(torch.float32).tiny)[..., None]
    table = dynamic_map_on(scales.device)
    codes = torch.bucketize(unit, (table[1:] + table[:-1]) / 2, out_int32=True)
    codes = codes.flatten(1)[:, : flat.shape[1]].to(torch.uint8).view(scales.shape)
    return codes, torch.cat([offset, absmax], 1)
