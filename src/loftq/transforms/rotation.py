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
from loftq.ops.reference import PER_TENSOR

ROTATIONS = ("none", "all", "auto")
"""Whether inputs are rotated: of no layer, of each, or of those that it serves."""


WIDEST = 64
"""Columns of a block at most, unless a format names another: wider ones lowered no error on SmolLM2
(benchmarks/quality/rotation_blocks.py), and a block of b costs b / out_features of the product."""


def largest_block(in_features: int) -> int:
    """Columns of the largest blocks, WIDEST at most, that fill a row; 0 where none do."""
    fitting = (block for block in BLOCKS if block <= WIDEST and in_features % block == 0)
    return max(fitting, default=0)


def rotated(spec: FormatSpec, in_features: int) -> FormatSpec:
    """The format with its inputs rotated in those blocks.

    Itself where none fill a row, where it names its own block, and where it cannot be rotated.
    """
    if spec.rotation or spec.group_size == PER_TENSOR:
        return spec
    return replace(spec, rotation=largest_block(in_features))


def rotate_gram(gram: Tensor, block: int) -> Tensor:
    """R^T H R of Grams H (n, in_features, in_features), in their dtype; H itself for block 0."""
    if not block:
        return gram
    return hadamard(hadamard(gram, block, False).mT, block, False)
