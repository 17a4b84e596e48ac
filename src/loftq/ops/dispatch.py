"""Which implementation runs, and why."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from functools import lru_cache

import torch
from torch import Tensor

from loftq.ops.reference import PER_TENSOR


def search_kernel(x: Tensor) -> Callable[[Tensor, Tensor, Tensor, Tensor], Tensor] | None:
    """The Triton scale search where it applies to rows `x`, else None for plain PyTorch."""
    if why_no_search_kernel(x):
        return None
    from loftq.ops.triton.scale_search import search_scales

    return search_scales


def why_no_search_kernel(x: Tensor) -> str:
    """Reason that the scale search of these rows runs in plain PyTorch; "" if it does not."""
    if why := why_no_triton(x.device):
        return why
    if x.shape[-1] > 256:
        return f"groups of {x.shape[-1]} columns are too long, the kernel holds 256"
    return ""


def round_kernel(x: Tensor) -> Callable[..., tuple[Tensor, Tensor]] | None:
    """The Triton rounding of grouped weights where it applies, else None for plain PyTorch."""
    if why_no_triton(x.device):
        return None
    from loftq.ops.triton.round import round_rows

    return round_rows


def dequantize_kernel(packed: Tensor, group_size: int) -> Callable[..., Tensor] | None:
    """The Triton dequantization where it applies, else None for the reference."""
    if why_no_dequantize_kernel(packed, group_size):
        return None
    from loftq.ops.triton.dequantize import dequantize

    return dequantize


def why_no_dequantize_kernel(packed: Tensor, group_size: int) -> str:
    """Reason that these bytes are dequantized in plain PyTorch; "" if they are not."""
    if group_size == PER_TENSOR:
        return "one scale for the whole tensor, which no kernel holds"
    return why_no_triton(packed.device)


@lru_cache
def why_no_triton(device: torch.device) -> str:
    """Reason that no Triton kernel runs on this device; "" if they do. Compiles one to find out."""
    if device.type != "cuda":
        return f"weights are on {device.type}, the kernels need a GPU"
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed"
    from loftq.ops.triton.round import round_rows

    one = torch.ones(1, 16, device=device)
    try:
        round_rows(one, one[:, 0].contiguous(), None, one[0].contiguous(), top=0, tiny=1e-30)
    except Exception as error:  # a compiler, driver or GPU that does not suit: anything is raised
        return f"triton does not work here: {str(error).strip().splitlines()[0]}"
    return ""
