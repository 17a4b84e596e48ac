"""What the loss takes at its peak, read off the code that computes it.

"chunked" is TRL's loss (trl.kernels.chunked_logprob, TRL 1.16): logits in tiles of TILE_TOKENS x
TILE_VOCABULARY, made again in the backward. The tiles are folded by a kernel on a GPU, and by plain
PyTorch, with its temporaries, elsewhere. "full" is transformers' own: the logits of all tokens.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from loftq.train.memory.probe import dequantize_scratch

TILE_TOKENS, TILE_VOCABULARY = 4096, 32768
FOLDED = 7 * 4 + 1
"""Bytes per entry of a tile in the PyTorch backward: y, z, log p, p, the gradient, the one-hot
target as float32 and their product, all float32, and the comparison (`_backward_tile`)."""
FULL = 4 + 4
"""Bytes per logit besides those of the logits themselves and of their gradient: log-softmax and
its gradient in float32."""
KINDS = ("chunked", "full")


@dataclass(frozen=True, kw_only=True)
class HeadOfLoss:
    """The output head, as far as the loss is concerned."""

    vocabulary: int
    hidden: int
    packed: bool


def loss_bytes(head: HeadOfLoss, *, kind: str, tokens: int, dtype: torch.dtype, device: str) -> int:
    """Bytes of the loss at its peak, in its backward, above the hidden states it is given.

    Args:
        head: the output head.
        kind: "chunked" or "full".
        tokens: that are trained on; all of a batch at most.
        dtype: in which logits are computed.
        device: "cuda" or "cpu".
    """
    item = dtype.itemsize
    if kind == "full":
        logits = tokens * head.vocabulary * (2 * item + FULL)
        return logits + _panels(head, head.vocabulary, item, device, copies=1)
    cuda = torch.device(device).type == "cuda"
    rows, width = min(tokens, TILE_TOKENS), min(head.vocabulary, TILE_VOCABULARY)
    tile = rows * TILE_VOCABULARY * item
    # The gradient of the hidden states in float32, then once more in their dtype.
    gradient = tokens * head.hidden * (4 + item)
    copy = tokens * head.hidden * item  # of the hidden states that are scored
    # A panel is bound to its name while the next one is made, hence two at a time.
    panels = _panels(head, width, item, device, copies=2 if head.vocabulary > width else 1)
    if cuda:
        return copy + gradient + tile + panels
    folded = rows * width * FOLDED
    widened = 0 if item == 4 else 4 * (rows * width + width * head.hidden)
    return copy + gradient + tile + max(folded, widened) + panels


def _panels(head: HeadOfLoss, rows: int, item: int, device: str, *, copies: int) -> int:
    """Bytes of the dense rows of a packed head; a dense head is read where it is."""
    if not head.packed:
        return 0
    weights = rows * head.hidden
    return copies * weights * item + dequantize_scratch(min(weights, 1 << 24), device)
