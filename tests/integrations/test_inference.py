import copy

import pytest
import torch
from peft import LoraConfig, get_peft_model

from loftq.integrations.decode import GraphDecoder
from loftq.integrations.inference import prepare_for_inference, undo_inference
from loftq.nn import pack_layer
from packed_folder import quantize, tiny_llama
from tolerances import KERNEL_ERROR_RATIO, MERGE_LOGITS

TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def adapted(dtype=torch.float32, **options):
    """A tiny packed Llama with a random, non-zero adapter on every linear layer."""
    model = tiny_llama(dtype=dtype)
    for path, module in list(model.named_modules()):
        if path.rsplit(".", 1)[-1] in TARGETS:
            pack_layer(model, path, quantize(module.weight.data))
    config = LoraConfig(r=4, lora_alpha=6, target_modules=TARGETS, **options)
    model = get_peft_model(model, config).eval()
    generator = torch.Generator().manual_seed(0)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            drawn = 0.1 * torch.randn(parameter.shape, generator=generator)
            parameter.data = drawn.to(parameter.dtype)  # PEFT keeps adapters in float32
    return model


@pytest.fixture
def tokens():
    return torch.randint(3, 97, (2, 7), generator=torch.Generator().manual_seed(0))


@torch.no_grad()
def test_folded_adapters_give_the_logits_of_the_stock_layers(tokens):
    model = adapted()
    wanted, state = model(tokens).logits, model.state_dict()
    done = prepare_for_inference(model)
    assert len(done.folded) == 14
    assert not done.left
    assert (model(tokens).logits - wanted).abs().max() <= MERGE_LOGITS
    assert list(model.state_dict()) == list(state)
    undo_inference(model)
    assert torch.equal(model(tokens).logits, wanted)


def test_folded_layers_still_train_merge_and_copy(tokens):
    model = adapted()
    prepare_for_inference(model)
    model(tokens).logits.sum().backward()
    assert all(p.grad is not None for n, p in model.named_parameters() if "lora_" in n)
    with torch.no_grad():
        wanted = model(tokens).logits
        other = copy.deepcopy(model)
        with model.disable_adapter():
            plain = model(tokens).logits
        assert (plain - wanted).abs().max() > 1e-3
        merged = other.merge_and_unload()
        assert (merged(tokens).logits - wanted).abs().max() <= MERGE_LOGITS


def test_layers_that_are_no_plain_lora_are_left_and_said_why(tokens):
    model = adapted(use_dora=True)
    done = prepare_for_inference(model)
    assert not done.folded
    assert set(done.left.values()) == {
        "adapter 'default' is no plain LoRA (DoRA or another variant)"
    }


def test_greedy_decoding_from_the_static_cache_equals_generate(tokens):
    model = adapted()
    prepare_for_inference(model)
    decoder = GraphDecoder(model, batch=2, max_length=16)
    found = decoder.generate(tokens, max_new_tokens=8)
    wanted = model.generate(
        input_ids=tokens, attention_mask=torch.ones_like(tokens), max_new_tokens=8,
        do_sample=False, eos_token_id=None,
    )  # fmt: skip
    assert torch.equal(found, wanted)
    assert torch.equal(decoder.generate(tokens, max_new_tokens=3), wanted[:, :10])


def test_a_sequence_that_stopped_repeats_its_stop_token(tokens):
    decoder = GraphDecoder(adapted(), batch=2, max_length=16)
    free = decoder.generate(tokens, max_new_tokens=6)
    stop = int(free[0, 9])
    found = decoder.generate(tokens, max_new_tokens=6, stop=stop)
    place = (found[0, 7:] == stop).int().argmax() + 7
    assert torch.equal(found[0, : place + 1], free[0, : place + 1])
    assert (found[0, place:] == stop).all()


def test_a_full_cache_and_wrong_prompts_are_refused(tokens):
    decoder = GraphDecoder(adapted(), batch=2, max_length=8)
    with pytest.raises(ValueError, match="prefill first"):
        decoder.step(tokens[:, 0])
    with pytest.raises(ValueError, match=r"expected \(2, 1 to 7\)"):
        decoder.prefill(tokens[:1])
    decoder.prefill(tokens)
    decoder.step(tokens[:, 0])
    with pytest.raises(ValueError, match="8 of 8 tokens"):
        decoder.step(tokens[:, 0])


@pytest.mark.gpu
@torch.no_grad()
def test_captured_steps_give_the_logits_of_the_plain_model(tokens):
    model = adapted(torch.float16).cuda()
    tokens = tokens.cuda()
    exact = copy.deepcopy(model).double()(tokens).logits[:, -1]
    plain = model(tokens).logits[:, -1].double()
    prepare_for_inference(model)
    decoder = GraphDecoder(model, batch=2, max_length=16)
    decoder.prefill(tokens[:, :4])
    for i in range(4, 7):
        logits = decoder.step(tokens[:, i])
    error = (logits.double() - exact).norm()
    assert error <= KERNEL_ERROR_RATIO * (plain - exact).norm()
