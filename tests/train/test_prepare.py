"""prepare_for_training: frozen, checkpointed, and a loss without full logits."""

from __future__ import annotations

import pytest
import torch

import loftq
import zoo
from loftq.train.prepare import prepare_for_training

pytest.importorskip("trl")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ["llama", "llama-tied"])
def test_the_fused_loss_of_a_packed_head_is_the_plain_one(name: str, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    model = zoo.build(name).to(dtype)
    model = loftq.quantize_model(model, rank=4, embedding=8, head=8)
    prepare_for_training(model)
    ids, labels = zoo.tokens(), zoo.tokens()
    labels[:, :4] = -100
    found = []
    for fused in (False, True):
        model.zero_grad()
        loss = model(
            input_ids=ids, labels=labels, **({"fused_lm_head": True} if fused else {})
        ).loss
        loss.backward()
        gradients = [p.grad.float() for p in model.parameters() if p.grad is not None]
        found.append((loss.detach().float(), torch.cat([g.flatten() for g in gradients])))
    (plain, wanted), (fused_loss, got) = found
    tolerance = {torch.float32: 1e-5, torch.bfloat16: 0.03}[dtype]
    torch.testing.assert_close(fused_loss, plain, rtol=tolerance, atol=tolerance)
    assert (got - wanted).norm() <= 2 * tolerance * wanted.norm()


@pytest.mark.parametrize("reentrant", [True, False])
def test_only_adapters_get_gradients(reentrant: bool) -> None:
    model = loftq.quantize_model(zoo.build("llama"), rank=4, embedding=8, head=8)
    prepare_for_training(model, reentrant=reentrant)
    assert not model.get_base_model().config.use_cache
    model(input_ids=zoo.tokens(), labels=zoo.tokens()).loss.backward()
    trained = [name for name, p in model.named_parameters() if p.grad is not None]
    assert len(trained) == 2 * 7 * zoo.BLOCKS
    assert all("lora_" in name for name in trained)


def test_a_model_with_nothing_to_train_is_refused() -> None:
    model = loftq.quantize_model(zoo.build("llama"), rank=4)
    model.requires_grad_(False)
    with pytest.raises(ValueError, match="no parameter takes gradients"):
        prepare_for_training(model)
