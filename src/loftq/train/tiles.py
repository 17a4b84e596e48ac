"""The loss of a causal language model by tiles of tokens, from shapes alone.

TRL's fused head scores the tokens that are learnt and no others, for which the host waits to hear
how many there are. This one scores all of them, so that a step can be captured (`train.graphs`).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.utils.checkpoint import checkpoint

IGNORED = -100
"""Label of a token that is not learnt."""
TILE = 1024
"""Tokens whose logits are held at once."""
AFTER_THE_HEAD = (
    "final_logit_softcapping", "logit_scale", "logits_scaling", "lm_head_multiplier",
    "output_multiplier",
)  # fmt: skip
"""Entries of a config that change logits after the head."""


def base_of(model: Any) -> Any:
    """The model of transformers in a PEFT model, or the model itself."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def why_not_tiled(base: Any) -> str:
    """Why this model's logits are not those of its head on its last hidden states, or ""."""
    config = base.config.get_text_config()
    for name in AFTER_THE_HEAD:
        if getattr(config, name, None) not in (None, 1, 1.0):
            return f"{name} changes its logits after the head"
    if base.get_output_embeddings() is None:
        return "it has no head"
    return ""


def tiled_loss(base: Any, batch: Mapping[str, Tensor]) -> Tensor:
    """Sum of -ln p over the tokens that are learnt, nats, () float32.

    Args:
        base: a causal language model of transformers, adapters in place.
        batch: `input_ids` and `labels` (rows, tokens), and what else the model reads.
    """
    inputs = {name: tensor for name, tensor in batch.items() if name != "labels"}
    hidden = base.base_model(**inputs, use_cache=False).last_hidden_state[:, :-1]
    labels = batch["labels"][:, 1:]
    flat, wanted = hidden.reshape(-1, hidden.shape[-1]), labels.reshape(-1)
    head = base.get_output_embeddings()
    total = flat.new_zeros((), dtype=torch.float32)
    for start in range(0, len(flat), TILE):
        tile = slice(start, start + TILE)
        total = total + checkpoint(
            _scored, head, flat[tile], wanted[tile],
            use_reentrant=False, preserve_rng_state=False,
        )  # fmt: skip
    return total


def _scored(head: nn.Module, hidden: Tensor, labels: Tensor) -> Tensor:
    return cross_entropy(head(hidden).float(), labels, ignore_index=IGNORED, reduction="sum")
