"""Padded batches, and a model run over them."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from loftq.train.padding import pad


def pad_inputs(features: Sequence[Mapping[str, Any]], tokenizer: Any) -> dict[str, Tensor]:
    """The tokenizer's own columns of some features as one batch, padded on its side.

    Columns that are not the tokenizer's (labels, offsets) are left out.
    """
    names = [name for name in ("attention_mask", "token_type_ids") if name in features[0]]
    fill = {"attention_mask": 0, "token_type_ids": 0, "input_ids": tokenizer.pad_token_id}
    left = tokenizer.padding_side == "left"
    found = {
        name: pad([feature[name] for feature in features], fill[name], left=left)
        for name in ("input_ids", *names)
    }
    if "attention_mask" not in found:
        ones = [[1] * len(feature["input_ids"]) for feature in features]
        found["attention_mask"] = pad(ones, 0, left=left)
    return found


def inputs_of(tokenizer: Any, encoded: Mapping[str, Any], i: int) -> dict[str, list[int]]:
    """Row i of a tokenizer's output: the columns that its model reads."""
    names = ("input_ids", "attention_mask", "token_type_ids")
    wanted = [name for name in names if name in encoded and name in tokenizer.model_input_names]
    return {name: list(encoded[name][i]) for name in wanted}


@contextlib.contextmanager
def scoring(model: nn.Module) -> Iterator[None]:
    """No dropout, no gradients, and one dtype for a 16-bit model with a float32 head."""
    training, device = model.training, next(model.parameters()).device
    dtype = getattr(model, "dtype", torch.float32)
    low = dtype in (torch.bfloat16, torch.float16)
    cast = torch.autocast(device.type, dtype=dtype) if low else contextlib.nullcontext()
    model.eval()
    try:
        with torch.no_grad(), cast:
            yield
    finally:
        model.train(training)


def in_batches(
    features: Sequence[Mapping[str, Any]],
    batch_size: int,
    run: Callable[[Sequence[Mapping[str, Any]]], Sequence[Any]],
    on_batch: Callable[[int, int], object],
) -> list[Any]:
    """Results of `run` for each feature, in their order; batches are of similar length.

    Args:
        features: with input_ids.
        batch_size: features at a time.
        run: results of one batch, one for each feature.
        on_batch: called with (features done, features in all).
    """
    order = sorted(range(len(features)), key=lambda i: len(features[i]["input_ids"]), reverse=True)
    found: list[Any] = [None] * len(features)
    for start in range(0, len(order), batch_size):  # the longest first: memory fails at once
        chosen = order[start : start + batch_size]
        for i, result in zip(chosen, run([features[i] for i in chosen]), strict=True):
            found[i] = result
        on_batch(start + len(chosen), len(order))
    return found


def on_device(batch: Mapping[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    """The batch where the model is."""
    device = next(model.parameters()).device
    return {name: tensor.to(device) for name, tensor in batch.items()}
