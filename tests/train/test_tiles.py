"""The loss by tiles against transformers' own, values and gradients."""

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from loftq.train import tiles
from loftq.train.errors import TrainError
from loftq.train.padding import IGNORED


def _model() -> LlamaForCausalLM:
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2}
    return LlamaForCausalLM(LlamaConfig(vocab_size=31, num_attention_heads=2, **sizes))


def test_loss_and_gradients_are_those_of_the_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tiles, "TILE", 4)
    model = _model()
    ids = torch.randint(0, 31, (3, 7))
    labels = ids.masked_fill(torch.rand(3, 7) < 0.3, IGNORED)
    batch = {"input_ids": ids, "labels": labels, "attention_mask": torch.ones_like(ids)}
    learnt = int(labels[:, 1:].ne(IGNORED).sum())
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


SMALL = {"vocab_size": 31, "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1,
         "num_attention_heads": 2, "num_key_value_heads": 2}  # fmt: skip


@pytest.mark.parametrize("kind", ["bert", "roberta", "electra"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_head_with_more_around_it_is_found_out(kind: str, dtype: torch.dtype) -> None:
    config = AutoConfig.for_model(kind, **SMALL, is_decoder=True)
    model = AutoModelForCausalLM.from_config(config).to(dtype).train()
    assert "not that of its head" in tiles.why_not_tiled(model)
    assert model.training


def test_labels_that_are_not_shifted_are_found_out() -> None:
    sizes = {"emb_dim": 16, "n_layers": 1, "n_heads": 2, "n_words": 31}
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model("xlm", **sizes))
    assert "not that of its head" in tiles.why_not_tiled(model)


def test_a_head_alone_is_taken_in_16_bits_too() -> None:
    assert tiles.why_not_tiled(_model().bfloat16()) == ""


def test_the_loss_of_a_router_is_named() -> None:
    few = {"num_local_experts": 2, "num_experts_per_tok": 1, "output_router_logits": True}
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model("mixtral", **SMALL, **few))
    assert tiles.why_not_tiled(model) == "its loss has a term of its router"


def test_a_loss_that_cannot_be_captured_is_refused_with_the_remedy() -> None:
    model = _model()
    model.config.logits_scaling = 8.0
    with pytest.raises(TrainError, match=r"graphs=true: logits_scaling .* with graphs=false\."):
        tiles.require_tiled(model)
