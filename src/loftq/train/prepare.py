"""A packed model made ready for training with any trainer, as `loftq train` makes it."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any

from torch import nn

from loftq.integrations.training import fuse_for_training

if TYPE_CHECKING:
    from peft import PeftModel

logger = logging.getLogger(__name__)


def prepare_for_training(
    model: PeftModel,
    *,
    checkpointing: bool = True,
    reentrant: bool = False,
    fused: bool = True,
) -> PeftModel:
    """Freeze all but the adapter, switch checkpointing on, and score tokens without full logits.

    PEFT's `prepare_model_for_kbit_training` does not know packed layers: it would cast embedding,
    head and norms to float32. Nothing is cast here. The model gets TRL's fused head if TRL is
    installed: `model(..., labels=labels, fused_lm_head=True)` returns log-probabilities of the
    labels and the loss without ever holding tokens x vocabulary logits, also from a packed head,
    which it reads by panels. TRL's trainers do the same by themselves.

    Args:
        model: from `loftq.load(..., trainable=True)` or `loftq.quantize_model`.
        checkpointing: keep only the inputs of each block.
        reentrant: torch's older kind of checkpointing, which needs gradients at the embedding.
        fused: compute projections that share an input together, and norms, rotary embeddings and
            gates in one kernel each, wherever that is the same
            (`loftq.integrations.training.fuse_for_training` returns which modules took which path).

    Returns:
        The same model, in training mode.

    Raises:
        ValueError: nothing is trainable.
    """
    base: Any = model.get_base_model()
    trainable = [name for name, p in model.named_parameters() if p.requires_grad]
    if not trainable:
        raise ValueError(
            "no parameter takes gradients: load the model with trainable=True, or attach an "
            "adapter first."
        )
    base.config.use_cache = False
    if checkpointing:
        base.gradient_checkpointing_enable({"use_reentrant": reentrant})
    if checkpointing and reentrant:
        base.enable_input_require_grads()
    add_fused_head(base)
    if fused:
        logger.info("%s", fuse_for_training(model))
    return model.train()


def add_fused_head(base: nn.Module) -> bool:
    """Give a causal language model TRL's fused head; False without TRL or without such a head."""
    try:
        from trl.trainer.utils import add_fused_lm_head
    except ImportError:
        return False
    if getattr(base, "get_output_embeddings", lambda: None)() is None:
        return False
    if not has_fused_head(base):
        add_fused_lm_head(base)
    return True


def has_fused_head(base: nn.Module) -> bool:
    """Whether TRL's fused head is in place: its forward bears the name of the one it replaces."""
    forward: Any = base.forward
    code = getattr(getattr(forward, "__func__", forward), "__code__", None)
    return code is not None and code.co_name == "_fused_forward"
