import pytest
import torch
from torch import nn

from loftq.train import Diverged, next_token_loss, tune_briefly


def adapted(seed: int = 0) -> nn.Module:
    """A tiny random Llama with LoRA adapters."""
    import transformers as hf
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(seed)
    config = hf.LlamaConfig(
        vocab_size=40, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
        num_attention_heads=2, num_key_value_heads=2,
    )  # fmt: skip
    lora = LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM")
    return get_peft_model(hf.LlamaForCausalLM(config), lora)


WINDOWS = torch.arange(3 * 12).view(3, 12) * 7 % 40


def test_the_same_start_gives_the_same_losses_and_parameters_to_the_bit():
    first, second = adapted(), adapted()
    losses = [tune_briefly(m, WINDOWS, steps=5, learning_rate=1e-2) for m in (first, second)]
    assert losses[0] == losses[1]
    for one, other in zip(first.parameters(), second.parameters(), strict=True):
        assert torch.equal(one, other)


def test_only_the_adapter_changes_and_the_loss_of_a_seen_window_falls():
    model = adapted()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    losses = tune_briefly(model, WINDOWS, steps=9, learning_rate=1e-2)
    changed = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    assert changed
    assert all("lora_" in name for name in changed)
    assert losses[6] < losses[0]  # the same window, seen for the third time
    assert not model.training


def test_windows_are_seen_in_order_one_a_step():
    model, seen = adapted(), []
    tune_briefly(
        model, WINDOWS, steps=4, learning_rate=0.0, on_step=lambda step, loss: seen.append(loss)
    )
    with torch.no_grad():
        expected = [next_token_loss(model, WINDOWS[[k]]).item() for k in (0, 1, 2, 0)]
    assert seen == pytest.approx(expected)


def test_a_loss_that_is_not_finite_stops_the_tuning():
    model = adapted()
    with torch.no_grad():
        model.get_base_model().model.norm.weight.fill_(float("nan"))
    with pytest.raises(Diverged, match="step 1: the loss is nan"):
        tune_briefly(model, WINDOWS, steps=2, learning_rate=1e-3)


def test_a_model_without_trainable_parameters_is_refused():
    model = adapted().requires_grad_(False)
    with pytest.raises(ValueError, match="trainable=True"):
        tune_briefly(model, WINDOWS, steps=1, learning_rate=1e-3)
