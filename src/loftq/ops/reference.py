"""The packed layout in plain PyTorch: the definition every kernel is tested against.

Layout (checkpoint/SPEC.md has it bit by bit). Codes are row-major, low bits first, each row padded
to whole bytes; 3 bits are a 2-bit plane followed by a 1-bit plane. Group g of a row covers the
columns [g * group_size, (g + 1) * group_size); the last group of a row may be shorter. Then

    w[i, j] = scale[i, j // group_size] * (value(code[i, j]) - zero[i, j // group_size])

in float32, where value() is a codebook level or the code itself.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import torch
from torch import Tensor

NESTED_RUN = 256  # scales that share one float32 absmax in the nested ("dq") coding
SCALE_BYTES = {"dq": 1, "f16": 2, "bf16": 2, "f32": 4}
SCALE_DTYPES = {"f16": torch.float16, "bf16": torch.bfloat16, "f32": torch.float32}
PER_CHANNEL, PER_TENSOR = 0, -1  # group_size: one scale per row; one scale for the whole tensor


def planes(bits: int) -> tuple[int, ...]:
    """Widths of the bit planes of a code, low bits first: 3 bits are stored as 2 + 1."""
    return (2, 1) if bits == 3 else (bits,)


def row_bytes(in_features: int, bits: int) -> int:
    """Bytes of one row of codes: each bit plane is padded to whole bytes."""
    return sum(-(-in_features * width // 8) for width in planes(bits))


def unpack_codes(packed: Tensor, in_features: int, bits: int) -> Tensor:
    """Codes (..., in_features) uint8 from packed rows (..., row_bytes) uint8."""
    codes, start, shift = None, 0, 0
    for width in planes(bits):
        per_byte = 8 // width
        stop = start + -(-in_features // per_byte)
        shifts = torch.arange(0, 8, width, dtype=torch.uint8, device=packed.device)
        plane = (packed[..., start:stop, None] >> shifts) & (2**width - 1)
        plane = plane.flatten(-2)[..., :in_features]
        codes = plane if codes is None else codes | (plane << shift)
        start, shift = stop, shift + width
    assert codes is not None
    return codes


@lru_cache
def _dynamic_map_values() -> tuple[float, ...]:
    values = [0.0, 1.0]
    for exponent in range(7):
        edges = torch.linspace(0.1, 1.0, 2**exponent + 1, dtype=torch.float32)
        means = (edges[:-1] + edges[1:]) / 2
        magnitudes = (10.0 ** (exponent - 6) * means).tolist()
        values += magnitudes + [-m for m in magnitudes]
    return tuple(sorted(values))


def dynamic_map(device: torch.device | str = "cpu") -> Tensor:
    """The 256 float32 values in [-1, 1] that code a scale in the nested coding, ascending.

    Seven decades 10^-6 .. 10^0; decade e holds the midpoints of 2^e equal steps of [0.1, 1], with
    both signs; then 0 and 1 (Dettmers et al., arXiv:2110.02861; bitsandbytes' signed dynamic map).
    """
    return torch.tensor(_dynamic_map_values(), dtype=torch.float32, device=device)


@lru_cache
def dynamic_map_on(device: torch.device) -> Tensor:
    """The same, made once for each device: a GPU waits for the host when one is made. Read only."""
    return dynamic_map(device)


def view_bytes(stored: Tensor, dtype: torch.dtype) -> Tensor:
    """Bytes as numbers. Bytes read from a file may start at an odd place of their storage."""
    stored = stored.contiguous()
    aligned = stored.storage_offset() % dtype.itemsize == 0
    return (stored if aligned else stored.clone()).view(dtype)


def decode_scales(scale: Tensor, nested: Tensor | None, coding: str) -> Tensor:
    """Scales (..., groups) float32 from their stored bytes (..., groups * itemsize) uint8.

    For "dq" `nested` holds a float32 offset and one float32 absmax per run of 256 scales:
    scale = map[code] * absmax[run] + offset, in float32 and in that order. `scale` is then one
    matrix (out_features, groups).
    """
    if coding != "dq":
        return view_bytes(scale, SCALE_DTYPES[coding]).float()
    assert nested is not None
    constants = view_bytes(nested, torch.float32)
    run = torch.arange(scale.numel(), device=scale.device) // NESTED_RUN
    values = dynamic_map_on(scale.device)[scale.flatten().long()]
    return (values * constants[1:][run] + constants[0]).view(scale.shape)


def spread(values: Tensor, in_features: int, group_size: int) -> Tensor:
    """Per-group values (out, groups) as per-column values, broadcastable to (out, in_features)."""
    if group_size <= 0:
        return values
    return values.repeat_interleave(group_size, -1)[..., :in_features]


@lru_cache
def _levels_on(levels: tuple[float, ...], device: torch.device) -> Tensor:
    return torch.tensor(levels, dtype=torch.float32, device=device)


def dequantize_reference(
    packed: Tensor,
    scale: Tensor,
    zero: Tensor | None,
    nested: Tensor | None,
    in_features: int,
    bits: int,
    group_size: int,
    scale_coding: str,
    levels: Sequence[float],
    default_zero: float,
    dtype: torch.dtype,
) -> Tensor:
    """Weights (out_features, in_features) in `dtype`; arguments as in `schema.dequantize`."""
    # Mixed-precision wrappers may have cast the bytes; 0..255 survive any float dtype we meet.
    packed, scale = packed.to(torch.uint8), scale.to(torch.uint8)
    zero = None if zero is None else zero.to(torch.uint8)
    nested = None if nested is None else nested.to(torch.uint8)
    codes = unpack_codes(packed, in_features, bits)
    scales = decode_scales(scale, nested, scale_coding)
    if levels:
        values = _levels_on(tuple(levels), codes.device)[codes.int()]
    else:
        values = codes.float()
    if zero is not None:
        groups = scales.shape[-1]
        if group_size == PER_TENSOR:
            zeros = view_bytes(zero, torch.float32)
        else:
            zeros = unpack_codes(zero, groups, bits).float()
        values -= spread(zeros, in_features, group_size)
    elif default_zero:
        values -= default_zero
    values *= spread(scales, in_features, group_size)
    return values.to(dtype)
