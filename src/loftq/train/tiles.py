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

from loftq.train.errors import TrainError
from loftq.train.padding import IGNORED

TILE = 1024
"""Tokens whose logits are held at once."""
SAME = 1e-3
"""Relative difference up to which logits and losses are the same: one product, taken twice."""
AFTER_THE_HEAD = (
    "final_logit_softcapping", "logit_scale", "logits_scaling", "lm_head_multiplier",
    "output_multiplier",
)  # fmt: skip
"""Entries of a config that change logits after the head."""


def base_of(model: Any) -> Any:
    """The model of transformers in a PEFT model, or the model itself."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def why_not_tiled(base: Any) -> str:
    """Why this model's loss is not that of its head on its last hidden states, or "".

    Tried on three tokens: BERT has a layer of its own before the head, and BART's labels stand
    under the tokens that predict them.
    """
    config = base.config.get_text_config()
    for name in AFTER_THE_HEAD:
        if getattr(config, name, None) not in (None, 1, 1.0):
            return f"{name} changes its logits after the head"
    if base.get_output_embeddings() is None:
        return "it has no head"
    if getattr(config, "output_router_logits", False):
        return "its loss has a term of its router"
    return "" if _agree(base) else "its loss is not that of its head on its last hidden states"


def require_tiled(base: Any) -> None:
    """Raise unless the loss of this model can be captured.

    Raises:
        TrainError: with the reason.
    """
    if why := why_not_tiled(base):
        raise TrainError(
            f"graphs=true: {why}, and its own loss waits for the host. Train it with graphs=false."
        )


@torch.no_grad()
def _agree(base: Any) -> bool:
    training, dtype, head = base.training, base.dtype, base.get_output_embeddings()
    ids = torch.tensor([[0, 1, 2]], device=base.device)
    low = dtype in (torch.bfloat16, torch.float16)
    base.eval()
    try:
        with torch.autocast(base.device.type, dtype, enabled=low):
            hidden = base.base_model(input_ids=ids, use_cache=False).last_hidden_state
            if hidden.shape[-1] != getattr(head, "in_features", hidden.shape[-1]):
                return False
            own = base(input_ids=ids, labels=ids, use_cache=False)
            loss = tiled_loss(base, {"input_ids": ids, "labels": ids}) / (ids.numel() - 1)
            logits, wanted = head(hidden).float(), own.logits.float()
    finally:
        base.train(training)
    same = (logits - wanted).norm() <= SAME * wanted.norm()
    return bool(same and (loss - own.loss).abs() <= SAME * own.loss)


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
