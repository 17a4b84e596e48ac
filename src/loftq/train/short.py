"""A few optimizer steps in a plain loop: the demo's, and only the demo's.

No warm-up, no accumulation, no mixed precision, no checkpoints, no randomness: window k of the text
is seen at step k, so that every row of a table is tuned on the same tokens in the same order.
Training in earnest is another matter and is not done with this.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from loftq.train.errors import Diverged


def next_token_loss(model: nn.Module, windows: Tensor) -> Tensor:
    """Mean cross-entropy (nats) of each token of a window given those before it.

    Args:
        model: a causal language model of transformers, or a PEFT model of one.
        windows: (n, context) int64 token ids; the first token of each is not predicted.
    """
    logits = model(input_ids=windows[:, :-1], use_cache=False).logits
    return nn.functional.cross_entropy(logits.flatten(0, 1).float(), windows[:, 1:].flatten())


def tune_briefly(
    model: nn.Module,
    windows: Tensor,
    *,
    steps: int,
    learning_rate: float,
    max_norm: float = 1.0,
    on_step: Callable[[int, float], object] | None = None,
) -> list[float]:
    """AdamW on the trainable parameters, one window a step, learning rate falling to zero.

    Deterministic: the same model, windows and settings on the same machine give the same losses and
    parameters. The model is left in eval mode.

    Args:
        model: a PEFT model whose adapter is trainable; the rest must be frozen.
        windows: (n, context) int64 token ids, seen in order and again from the start if n < steps.
        steps: optimizer steps.
        learning_rate: of the first step; step k of n has learning_rate * (1 - k / n).
        max_norm: gradients of a larger norm are scaled down to it.
        on_step: called with the step's number (from 1) and its loss.

    Returns:
        The loss before each step, in nats per token.

    Raises:
        Diverged: a loss is not finite.
        ValueError: nothing to train.
    """
    adapter = [p for p in model.parameters() if p.requires_grad]
    if not adapter:
        raise ValueError("no parameter takes gradients: load the model with trainable=True.")
    optimizer = torch.optim.AdamW(adapter, lr=learning_rate, weight_decay=0.0)
    losses = []
    model.train()
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate * (1 - step / steps)
        loss = next_token_loss(model, windows[step % len(windows)][None])
        losses.append(loss.item())
        if not torch.isfinite(loss):
            raise Diverged(f"step {step + 1}: the loss is {losses[-1]}. Lower the learning rate.")
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(adapter, max_norm)
        optimizer.step()
        if on_step is not None:
            on_step(step + 1, losses[-1])
    model.eval()
    return losses
