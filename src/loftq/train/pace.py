"""How long an epoch will take, guessed from a forward pass on this very machine."""

from __future__ import annotations

import inspect
import time
from typing import Any

import torch

PASSES = {True: 4, False: 3}
"""Checkpointed or not: forward passes that a step is worth. Backward counts as two."""
LONGEST = 256  # tokens that are tried


def epoch_seconds(model: Any, ids: list[int], *, tokens: int, checkpointing: bool) -> float:
    """Rough seconds for one epoch.

    Args:
        model: loaded, on its device; its mode is kept.
        ids: a typical row.
        tokens: of an epoch, padding left out.
        checkpointing: whether blocks are computed again for the backward pass.
    """
    row = torch.tensor(ids[:LONGEST])[None].to(next(model.parameters()).device)
    whole, training = model.get_base_model(), model.training
    options: dict[str, Any] = {"use_cache": False}
    if "logits_to_keep" in inspect.signature(whole.forward).parameters:
        options["logits_to_keep"] = 1  # all logits of a long row may not fit
    model.eval()
    with torch.no_grad():
        for _ in range(2):  # the first one compiles and allocates
            begin = time.perf_counter()
            float(model(input_ids=row, **options).logits[0, -1, 0])  # waits for a GPU
            seconds = time.perf_counter() - begin
    model.train(training)
    return PASSES[checkpointing] * seconds * tokens / row.shape[1]
