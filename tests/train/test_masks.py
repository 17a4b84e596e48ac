"""Masks in a capture are those of the same step kernel by kernel."""

from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, masking_utils

from loftq.train.masks import MASK, LayerMasks, layers_of
from loftq.train.tiles import tiled_loss

SIZES = {"vocab_size": 31, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2,
         "num_attention_heads": 2}  # fmt: skip


@pytest.fixture
def model() -> LlamaForCausalLM:
    torch.manual_seed(0)
    made = LlamaForCausalLM(LlamaConfig(**SIZES)).train()
    made.gradient_checkpointing_enable({"use_reentrant": False})
    return made


def _gradients(model: Any, batch: dict[str, Tensor], seen: list[bool]) -> list[Tensor]:
    def see(layer: Any, args: Any, kwargs: dict[str, Any]) -> None:
        seen.append(kwargs[MASK] is not None)

    handles = [m.register_forward_pre_hook(see, with_kwargs=True) for m in layers_of(model)]
    found = torch.autograd.grad(tiled_loss(model, batch), list(model.parameters()))
    for handle in handles:
        handle.remove()
    return list(found)


def test_layers_without_a_mask_are_given_none_where_nothing_can_be_looked_at(
    monkeypatch: pytest.MonkeyPatch, model: LlamaForCausalLM
) -> None:
    ids = torch.randint(0, 31, (2, 6))
    batch, masks, seen = {"input_ids": ids, "labels": ids}, LayerMasks(layers_of(model)), []
    with masks.noted("key", batch):
        wanted = _gradients(model, batch, seen)
    assert not any(seen)
    monkeypatch.setattr(masking_utils, "is_tracing", lambda *_: True)  # as in a capture
    packed = {**batch, "position_ids": torch.arange(6)[None].expand(2, 6)}
    traced: list[bool] = []
    _gradients(model, packed, traced)
    assert all(traced), "transformers hands out masks where it cannot look"
    kept: list[bool] = []
    with masks.kept("key"):
        found = _gradients(model, packed, kept)
    assert len(kept) >= len(masks.layers)  # twice as many where hooks run again in the backward
    assert not any(kept)
    torch.testing.assert_close(found, wanted)
    assert not any(layer._forward_pre_hooks for layer in masks.layers)


def test_a_batch_whose_values_decide_is_left_alone(model: LlamaForCausalLM) -> None:
    ids = torch.randint(0, 31, (2, 6))
    masks = LayerMasks(layers_of(model))
    for name in (MASK, "position_ids"):
        batch = {"input_ids": ids, "labels": ids, name: torch.ones_like(ids)}
        with masks.noted(name, batch):
            model(**batch)
        with masks.kept(name):
            assert not any(layer._forward_pre_hooks for layer in masks.layers)


def test_padding_on_the_right_needs_no_mask(model: LlamaForCausalLM) -> None:
    ids = torch.randint(0, 31, (2, 6))
    mask = torch.tensor([[1, 1, 1, 1, 1, 1], [1, 1, 1, 0, 0, 0]])
    labels = ids.masked_fill(mask == 0, -100)
    batch = {"input_ids": ids, "labels": labels, MASK: mask}
    wanted = torch.autograd.grad(tiled_loss(model, batch), list(model.parameters()))
    del batch[MASK]
    found = torch.autograd.grad(tiled_loss(model, batch), list(model.parameters()))
    torch.testing.assert_close(found, wanted)
