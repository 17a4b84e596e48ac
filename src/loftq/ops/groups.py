"""Products of one input with several packed weights: q, k and v, or gate and up, in one launch."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from loftq.ops.dispatch import why_no_small_linear
from loftq.ops.few_tokens import Member, small_linears
from loftq.ops.schema import quant_linear, quant_linear_lora

MOST_MEMBERS = 3


def linears(x: Tensor, members: Sequence[Member], *, overlap: bool = False) -> Tensor:
    """y = [x W_i^T + s_i (x A_i^T) B_i^T for each member i], side by side; for inference.

    Of stacked adapters a token's own A and B.

    Args:
        x: (tokens, in_features).
        members: of any format, with or without adapter.
        overlap: the launch may start while the kernel before it runs (`few_tokens.small_linears`).

    Returns:
        (tokens, sum of out_features) in x's dtype.
    """
    if not why_not_together(x, members):
        return small_linears(x, members, overlap=overlap)
    return torch.cat([_linear(x, member) for member in members], -1)


def why_not_together(x: Tensor, members: Sequence[Member]) -> str:
    """Reason that these products take a launch each, or ""."""
    first = members[0]
    if x.device.type != "cuda":
        return f"x is on {x.device.type}, where a launch costs nothing"
    if len(members) > MOST_MEMBERS:
        return f"{len(members)} weights, the kernel holds {MOST_MEMBERS}"
    for member in members:
        if why := why_no_small_linear(x, member.packed, *member.layout[:2]):
            return why
        if member.layout != first.layout or (member.zero is None) != (first.zero is None):
            return f"formats differ: {member.layout[:3]} beside {first.layout[:3]}"
        if member.stacked != first.stacked:
            return f"{member.stacked} adapters are stacked beside {first.stacked}"
        if member.rank != first.rank or _dtypes(member) != _dtypes(first):
            return f"adapters differ: rank {member.rank} beside {first.rank}, or their dtypes"
    return ""


def _linear(x: Tensor, m: Member) -> Tensor:
    stored = (m.packed, m.scale, m.zero, m.nested)
    if m.lora_A is None or m.lora_B is None or m.stacked > 1:
        y = quant_linear(x, *stored, *m.layout, True)
        if m.lora_A is None or m.lora_B is None:
            return y
        return add_stacked(y, x, m.lora_A, m.scaling * m.lora_B, m.stacked)
    return quant_linear_lora(x, *stored, *m.layout, m.lora_A, m.lora_B, m.scaling)


def add_stacked(y: Tensor, x: Tensor, lora_A: Tensor, lora_B: Tensor, stacked: int) -> Tensor:
    """y_m + (x_m A_m^T) B_m^T for the m-th of `stacked` equal parts of the rows, in y's dtype.

    Args:
        y: (stacked x rows, ..., out_features).
        x: (stacked x rows, ..., in_features).
        lora_A: (stacked x rank, in_features), the adapters one below the other.
        lora_B: (out_features, stacked x rank), side by side, in A's dtype.
        stacked: how many.
    """
    down = lora_A.unflatten(0, (stacked, -1)).mT  # (stacked, in, rank)
    up = lora_B.unflatten(1, (stacked, -1)).permute(1, 2, 0)  # (stacked, rank, out)
    rows = x.reshape(stacked, -1, x.shape[-1]).to(lora_A.dtype)
    each = y.reshape(stacked, -1, y.shape[-1]).to(lora_A.dtype)
    return torch.baddbmm(each, torch.bmm(rows, down), up).view(y.shape).to(y.dtype)


def _dtypes(member: Member) -> tuple[torch.dtype | None, ...]:
    return tuple(None if t is None else t.dtype for t in (member.lora_A, member.lora_B))
