"""Float32 products in float32, whatever precision the process allows for its own."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch


@contextmanager
def full_float32() -> Iterator[None]:
    """Within it no float32 product is rounded to TF32 or bfloat16; the settings come back after.

    `torch.set_float32_matmul_precision` is a setting of the whole process, made for training.
    Statistics, factorizations and the passing on of rounding errors would follow it silently.
    """
    backends: Any = torch.backends  # what is set here has no types
    settings = (backends.cuda.matmul, backends.mkldnn.matmul)
    before = [products.fp32_precision for products in settings]
    try:
        for products in settings:
            products.fp32_precision = "ieee"
        yield
    finally:
        for products, was in zip(settings, before, strict=True):
            products.fp32_precision = was
