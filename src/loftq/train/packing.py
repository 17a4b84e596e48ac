"""Whether a model keeps the rows of a packed sequence apart."""

from __future__ import annotations

import inspect
from typing import Any

import torch

LEAK = 1e-4
"""Largest relative change that rounding may cause where nothing leaks."""


def keeps_apart(model: Any, vocabulary: int) -> bool:
    """Whether a row is blind to the row packed before it.

    Position ids that begin again tell transformers' attention where a row begins; models with an
    attention of their own may not look. So it is tried: the logits of the second of two rows must
    not change when the first one does.

    Args:
        model: a causal language model; its mode is kept.
        vocabulary: number of token ids.
    """
    whole = model.get_base_model() if hasattr(model, "get_base_model") else model
    if "position_ids" not in inspect.signature(whole.forward).parameters:
        return False
    second = torch.arange(6) % vocabulary
    firsts = torch.arange(5) % vocabulary, (torch.arange(5) * 3 + vocabulary // 2) % vocabulary
    positions = torch.cat([torch.arange(5), torch.arange(6)])[None]
    device, training = next(model.parameters()).device, model.training
    model.eval()
    seen = []
    with torch.no_grad():
        for first in firsts:
            ids = torch.cat([first, second])[None].to(device)
            found = model(input_ids=ids, position_ids=positions.to(device), use_cache=False)
            seen.append(found.logits[0, len(first) :].float())
    model.train(training)
    return bool((seen[0] - seen[1]).abs().max() <= LEAK * seen[0].abs().max())
