"""The basis of the inputs in which a weight is stored, and the way into it and back.

A rotated format (`-h64`) stores W R in place of W, R as in ops/hadamard.py. Everything outside of
the bytes, a dequantized weight, its adapter and its Gram, is in the model's own basis.
"""

from __future__ import annotations

import torch
from torch import Tensor

from loftq.formats.spec import FormatSpec
from loftq.ops.hadamard import hadamard


def to_stored_basis(W: Tensor, spec: FormatSpec) -> Tensor:
    """W R for weights or inputs (..., in_features); W itself where the format is not rotated."""
    return hadamard(W, spec.rotation, False) if spec.rotation else W


def from_stored_basis(values: Tensor, spec: FormatSpec) -> Tensor:
    """Values R^T, the inverse of `to_stored_basis`; also the gradient of rotated inputs."""
    return hadamard(values, spec.rotation, True) if spec.rotation else values


def decoded_dtype(spec: FormatSpec, dtype: torch.dtype) -> torch.dtype:
    """The dtype that bytes are decoded in for a weight in `dtype`: it is rounded once, at last."""
    return torch.float32 if spec.rotation else dtype
