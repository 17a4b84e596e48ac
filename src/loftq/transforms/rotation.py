"""Rotated inputs before rounding: which layers, in what blocks, and the Gram they then have.

    x W^T = (x R) (W R)^T,    R = D (I (x) H_b) / sqrt(b),    Gram of x R: R^T E[x x^T] R

Each column of W R mixes b columns of W, so that outliers are spread over a block and a group's
grid has less to span (QuIP#, arXiv:2402.04396; QuaRot, arXiv:2404.00456). Only the rounding sees
the rotated basis: Q = q(W R) R^T, and the adapter, the metric and the target stay as they are.
That is the adapter of the rotated problem too, A = A_R R^T, since R is orthogonal.
"""

from __future__ import annotations

from dataclasses import replace

from torch import Tensor

from loftq.formats import FormatSpec
from loftq.ops.hadamard import BLOCKS, hadamard

ROTATIONS = ("none", "all", "auto")
"""Whether inputs are rotated: of no layer, of each, or of those that it serves."""


def largest_block(in_features: int) -> int:
    """Columns of the largest blocks that fill a row; 0 where none do."""
    return max((block for block in BLOCKS if in_features % block == 0), default=0)


def rotated(spec: FormatSpec, in_features: int) -> FormatSpec:
    """The format with its inputs rotated in the largest blocks; itself where none fill a row."""
    return replace(spec, rotation=largest_block(in_features))


def rotate_gram(gram: Tensor, block: int) -> Tensor:
    """R^T H R of Grams H (n, in_features, in_features), in their dtype; H itself for block 0."""
    if not block:
        return gram
    return hadamard(hadamard(gram, block, False).mT, block, False)
