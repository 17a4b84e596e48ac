"""What the loss takes at its peak, read off the code that computes it.

"chunked" is TRL's loss (trl.kernels.chunked_logprob, TRL 1.16): logits in tiles of TILE_TOKENS x
TILE_VOCABULARY, made again in the backward. The tiles are folded by a kernel on a GPU, and by plain
PyTorch, with its temporaries, elsewhere. "full" is transformers' own: the logits of all tokens.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from loftq.ops.panels import panel_rows
from loftq.train.memory.probe import dequantize_scratch

TILE_TOKENS, TILE_VOCABULARY = 4096, 32768
FOLDED = 7 * 4 + 1
"""Bytes per entry of a tile in the PyTorch backward: y, z, log p, p, the gradient, the one-hot
target as float32 and their product, all float32, and the comparison (`_backward_tile`)."""
FOLDED_FORWARD = 3 * 4 + 1
"""The same in the PyTorch forward: z, its exponential and a product, and a comparison."""
FULL = 4 + 4
"""Bytes per logit besides those of the logits themselves: in the forward a float32 copy and the
log-softmax, in the backward the log-softmax and its gradient (then the logits' own, too)."""
KINDS = ("chunked", "full")


@dataclass(frozen=True, kw_only=True)
class HeadOfLoss:
    """The output head, as far as the loss is concerned."""

    vocabulary: int
    hidden: int
    packed: bool


def loss_bytes(
    head: HeadOfLoss, *, kind: str, tokens: int, dtype: torch.dtype, device: str, backward: bool
) -> int:
    """Bytes of the loss at its peak, above the hidden states it is given.

    Args:
        head: the output head.
        kind: "chunked" or "full".
        tokens: that are trained on; all of a batch at most.
        dtype: in which logits are computed.
        device: "cuda" or "cpu".
        backward: in its backward, else in its forward.
    """
    item = dtype.itemsize
    if kind == "full":
        logits = tokens * head.vocabulary * item * (1 + backward)
        panel = panel_rows(head.vocabulary, head.hidden, torch.device(device))
        # The head's product is over when the loss begins, and begins when its gradient is there.
        return logits + max(tokens * head.vocabulary * FULL, _panel(head, panel, item))
    rows, width = min(tokens, TILE_TOKENS), min(head.vocabulary, TILE_VOCABULARY)
    taken = tokens * head.hidden * item + rows * TILE_VOCABULARY * item  # what is scored; a tile
    if backward:  # the gradient of the hidden states in float32, then once more in their dtype
        taken += tokens * head.hidden * (4 + item)
    # In the backward a panel is bound to its name while the next one is made, hence two at a time.
    taken += (2 if backward and head.vocabulary > width else 1) * _panel(head, width, item)
    if torch.device(device).type == "cuda":
        return taken
    folded = rows * width * (FOLDED if backward else FOLDED_FORWARD)
    widened = 0 if item == 4 or not backward else 4 * width * (rows + head.hidden)
    panel = panel_rows(width, head.hidden, torch.device(device)) * head.hidden
    unpacked = dequantize_scratch(panel, device) if head.packed else 0
    return taken + max(folded, widened, unpacked)  # one after the other


def _panel(head: HeadOfLoss, rows: int, item: int) -> int:
    """Bytes of dense rows of a packed head; a dense head is read where it is."""
    return rows * head.hidden * item if head.packed else 0
