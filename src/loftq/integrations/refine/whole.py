"""The whole packed model after the original one: last hidden state, next-token distribution, text.

The original model runs once, block by block from its checkpoint, and leaves the last hidden states
of all tokens in host memory. Its logits are made again from them, for some tokens at a time, so
that the divergence is exact and the device never holds two models.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from loftq.integrations.blocks import CheckpointBlocks
from loftq.integrations.refine.passage import Passage, Piece, first
from loftq.integrations.refine.sitting import Sitting
from loftq.integrations.refine.student import Student, pieces_of
from loftq.integrations.structure import text_config
from loftq.refine import Stage, mean_divergence, next_token_loss
from loftq.refine.losses import Head
from loftq.refine.rows import ERRORS

WHOLE = "model"
"""The one unit of this scope."""


def refine_whole(stage: Stage, student: Student, sitting: Sitting) -> None:
    """Carry out a stage of scope model."""
    if sitting.take_over(WHOLE, student.adapter()):
        return
    pieces, batches = pieces_of(sitting.windows.ids, sitting.windows.mask, stage.batch)
    loss = model_loss(stage, student, sitting, pieces)
    tokens = max(mask.numel() for _, mask in pieces)
    with student.whole(tokens):
        factors = student.adapter()
        found = sitting.descend(list(factors.values()), loss, batches, resumable=WHOLE)
        sitting.settle(WHOLE, factors, found)


def model_loss(
    stage: Stage, student: Student, sitting: Sitting, pieces: Sequence[Piece]
) -> Callable[[int], Tensor]:
    """The stage's loss of the whole packed model by number of a piece; runs the original once."""
    original = sitting.open_original()
    wanted = _last_hidden(original, pieces)
    heads = _heads(student, original)
    error, device = ERRORS[stage.error], student.device

    def loss(number: int) -> Tensor:
        ids, mask = (part.to(device) for part in pieces[number])
        h = wanted[number].to(device)
        with student.autocast():
            h_hat = first(student.forward(ids, mask))
            if heads is None:
                return error(h_hat, h, mask)
            total = h_hat.new_zeros((), dtype=torch.float32)
            if stage.hidden:
                total = total + stage.hidden * error(h_hat, h, mask)
            if stage.kl:
                total = total + stage.kl * mean_divergence(h_hat, h, heads, mask)
            if stage.language:
                total = total + stage.language * next_token_loss(h_hat, ids, heads[0], mask)
        return total

    return loss


def _last_hidden(original: CheckpointBlocks, pieces: Sequence[Piece]) -> list[Tensor]:
    with Passage(original, pieces) as passage:
        passage.finish()
        return [passage.last_hidden(number).cpu() for number in range(len(pieces))]


def _heads(student: Student, original: CheckpointBlocks) -> tuple[Head, Head] | None:
    """From hidden states to logits in both models; None for a model that predicts no token."""
    if student.peft.active_peft_config.task_type != "CAUSAL_LM":
        return None
    original.load_head()
    return _head(student.module), _head(original.module)


def _head(model: nn.Module) -> Head:
    """A causal model's head with what its config does to the logits afterwards."""
    head = model.get_output_embeddings()  # type: ignore[operator]
    config = text_config(model.config)
    cap = getattr(config, "final_logit_softcapping", None)
    divisor = getattr(config, "logits_scaling", None) or 1.0
    factor = getattr(config, "logit_scale", None) or 1.0

    def logits(hidden: Tensor) -> Tensor:
        found = head(hidden.to(head.weight.dtype)) * (factor / divisor)
        return found if cap is None else cap * torch.tanh(found / cap)

    return logits
