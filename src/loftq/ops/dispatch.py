"""Which implementation runs, and why."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from functools import lru_cache

from torch import Tensor


def search_kernel(x: Tensor) -> Callable[[Tensor, Tensor, Tensor, Tensor], Tensor] | None:
    """The Triton scale search where it applies to rows `x`, else None for plain PyTorch."""
    if why_no_search_kernel(x):
        return None
    from loftq.ops.triton.scale_search import search_scales

    return search_scales


def why_no_search_kernel(x: Tensor) -> str:
    """Reason that the scale search of these rows runs in plain PyTorch; "" if it does not."""
    if x.device.type != "cuda":
        return f"weights are on {x.device.type}, the kernel needs a GPU"
    if not _has_triton():
        return "triton is not installed"
    if x.shape[-1] > 256:
        return f"groups of {x.shape[-1]} columns are too long, the kernel holds 256"
    return ""


@lru_cache
def _has_triton() -> bool:
    return importlib.util.find_spec("triton") is not None
