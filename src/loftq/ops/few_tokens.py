"""The few-token product on a GPU, of one weight or of several with one input, in one launch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from torch import Tensor

from loftq.ops.dispatch import why_no_cuda_product


class Member(NamedTuple):
    """A packed weight with its adapter, if any; fields as in `schema.quant_linear_lora`."""

    packed: Tensor
    scale: Tensor
    zero: Tensor | None
    nested: Tensor | None
    layout: tuple[int, int, str, Sequence[float], float]
    lora_A: Tensor | None = None
    lora_B: Tensor | None = None
    scaling: float = 1.0
    stacked: int = 1
    """Adapters along the rank: A (stacked x r, in), B (out, stacked x r). The tokens are theirs in
    equal parts, in order."""

    @property
    def rank(self) -> int:
        """Rows of A; 0 without an adapter."""
        return 0 if self.lora_A is None else self.lora_A.shape[0]


def small_linears(x: Tensor, members: Sequence[Member], *, overlap: bool = False) -> Tensor:
    """[x W_i^T + s_i (x A_i^T) B_i^T for each member i], side by side, in CUDA C++ or else Triton.

    Args:
        x: (tokens, in_features), float16 or bfloat16.
        members: weights that `groups.why_not_together` has nothing against.
        overlap: the launch may start while the kernel before it runs, which must not write weights.

    Returns:
        (tokens, sum of out_features) in x's dtype.
    """
    if not why_no_cuda_product(x, members):
        from loftq.ops.cuda.few_tokens import few_tokens

        return few_tokens(x, members, overlap=overlap or None)
    from loftq.ops.triton import linear

    return linear.small_linears(x, members, overlap=overlap)


def small_linear(
    x: Tensor,
    packed: Tensor,
    scale: Tensor,
    zero: Tensor | None,
    nested: Tensor | None,
    bits: int,
    group_size: int,
    scale_coding: str,
    levels: Sequence[float],
    default_zero: float,
    lora_A: Tensor | None = None,
    lora_B: Tensor | None = None,
    scaling: float = 1.0,
) -> Tensor:
    """`small_linears` of one weight, arguments as in `schema.quant_linear_lora`."""
    layout = (bits, group_size, scale_coding, levels, default_zero)
    member = Member(packed, scale, zero, nested, layout, lora_A, lora_B, scaling)
    return small_linears(x, (member,))
