"""The loss by tiles against transformers' own, values and gradients."""

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from loftq.train import tiles


def _model() -> LlamaForCausalLM:
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2}
    return LlamaForCausalLM(LlamaConfig(vocab_size=31, num_attention_heads=2, **sizes))


def test_loss_and_gradients_are_those_of_the_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tiles, "TILE", 4)
    model = _model()
    ids = torch.randint(0, 31, (3, 7))
    labels = ids.masked_fill(torch.rand(3, 7) < 0.3, tiles.IGNORED)
    batch = {"input_ids": ids, "labels": labels, "attention_mask": torch.ones_like(ids)}
    learnt = int(labels[:, 1:].ne(tiles.IGNORED).sum())
    wanted = model(**batch).loss * learnt
    gradients = torch.autograd.grad(wanted, list(model.parameters()))
    found = tiles.tiled_loss(model, batch)
    torch.testing.assert_close(found, wanted.detach(), rtol=1e-5, atol=1e-5, check_stride=False)
    torch.testing.assert_close(torch.autograd.grad(found, list(model.parameters())), gradients)


def test_logits_that_change_after_the_head_are_named() -> None:
    model = _model()
    assert tiles.why_not_tiled(model) == ""
    model.config.logits_scaling = 8.0
    assert "logits_scaling changes its logits" in tiles.why_not_tiled(model)
