"""A decoded token from our own kernels is transformers' token, for each known architecture."""

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from loftq.integrations.decode import GraphDecoder
from loftq.integrations.fused_step import FusedStep, why_not_fused
from loftq.integrations.guard import guard_adapter
from loftq.integrations.members import average_
from loftq.nn import pack_layer
from loftq.nn.members import attach_members_
from packed_folder import quantize
from tolerances import KERNEL_ERROR_RATIO, MERGE_LOGITS

KINDS = {
    "llama": (LlamaConfig, LlamaForCausalLM, {}),
    "mistral": (MistralConfig, MistralForCausalLM, {"sliding_window": None}),
    "qwen2": (Qwen2Config, Qwen2ForCausalLM, {}),
    "qwen3": (Qwen3Config, Qwen3ForCausalLM, {}),
}
TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def make(kind, dtype=torch.float32, adapter=True, **options):
    """A packed tiny model whose norms and biases are no constants, with a random adapter."""
    config, model_class, extra = KINDS[kind]
    torch.manual_seed(0)
    model = model_class(
        config(
            hidden_size=128, intermediate_size=192, num_hidden_layers=2, num_attention_heads=4,
            num_key_value_heads=2, head_dim=32, vocab_size=97, max_position_embeddings=64,
            **{**extra, **options},
        )
    ).eval()  # fmt: skip
    for name, parameter in model.named_parameters():
        if name.endswith("bias") or "norm" in name:
            parameter.data += 0.3 * torch.randn_like(parameter)
    model = model.to(dtype)
    for path, module in list(model.named_modules()):
        if path.rsplit(".", 1)[-1] in TARGETS:
            pack_layer(model, path, quantize(module.weight.data, "nf4-g64"))
    if adapter:
        config = LoraConfig(r=4, target_modules=TARGETS, init_lora_weights=False)
        model = get_peft_model(model, config).eval().to(dtype)
    return model


@pytest.fixture
def prompts():
    return torch.randint(3, 97, (2, 7), generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("adapter", [True, False])
@pytest.mark.parametrize("kind", KINDS)
def test_steps_have_the_logits_of_transformers(kind, adapter, prompts):
    model = make(kind, adapter=adapter)
    stock = GraphDecoder(model, batch=2, max_length=16, fused=False)
    fused = GraphDecoder(model, batch=2, max_length=16, fused=True)
    assert fused.not_fused == ""
    for _ in range(2):  # a second prompt starts over
        token = stock.prefill(prompts).argmax(-1)
        assert torch.equal(fused.prefill(prompts).argmax(-1), token)
        for _ in range(5):
            wanted = stock.step(token)
            assert (fused.step(token) - wanted).abs().max() <= MERGE_LOGITS
            token = wanted.argmax(-1)


def ensemble(dtype=torch.float32, members=3):
    """The tiny Llama with random adapters of several members, averaged."""
    model = make("llama", dtype, adapter=False)
    generator = torch.Generator().manual_seed(0)
    factors = {}
    for path, layer in model.named_modules():
        if path.rsplit(".", 1)[-1] in TARGETS:
            shapes = (members, 4, layer.in_features), (members, layer.out_features, 4)
            factors[path] = [
                (0.3 * torch.randn(shape, generator=generator)).to(dtype) for shape in shapes
            ]
    attach_members_(model, factors, {}, scaling=0.5)
    average_(model, members)
    return model


def test_members_take_the_steps_of_one_model(prompts):
    model = ensemble()
    stock, fused = (
        GraphDecoder(model, batch=2, max_length=16, fused=kind) for kind in (False, True)
    )
    assert fused.not_fused == ""
    token = stock.prefill(prompts).argmax(-1)
    fused.prefill(prompts)
    for _ in range(5):
        wanted = stock.step(token)
        assert torch.allclose(wanted.exp().sum(-1), torch.ones(2), atol=1e-4)
        assert (fused.step(token) - wanted).abs().max() <= MERGE_LOGITS
        token = wanted.argmax(-1)


@torch.no_grad()
def test_what_is_not_known_is_left_to_transformers_and_said(prompts):
    assert "slides over 4 tokens" in why_not_fused(make("mistral", sliding_window=4))
    assert "gelu" in why_not_fused(make("llama", hidden_act="gelu"))
    assert "gate_proj: it has a bias" in why_not_fused(make("llama", mlp_bias=True))
    model = make("llama", adapter=False)
    model.model.layers[1].mlp.up_proj = torch.nn.Linear(128, 192, bias=False)
    assert why_not_fused(model) == "layers.1.mlp.up_proj: Linear is no packed linear layer"
    decoder = GraphDecoder(model, batch=2, max_length=16, fused=True)
    decoder.prefill(prompts)
    wanted = model(torch.cat([prompts, prompts[:, :1]], 1)).logits[:, -1]
    assert (decoder.step(prompts[:, 0]) - wanted).abs().max() <= MERGE_LOGITS
    hooked = make("llama", adapter=False)
    hooked.model.layers[0].mlp.register_forward_hook(lambda *_: None)
    assert why_not_fused(hooked) == "model.layers.0.mlp has hooks, which would not run"


def test_the_guard_of_a_loaded_backbone_does_not_stand_in_the_way():
    """It waits on the first packed layer until a forward ran, and computes nothing."""
    model = make("llama")
    guard_adapter(model)
    assert why_not_fused(model) == ""


def test_overlap_is_refused_where_launches_cannot():
    with pytest.raises(ValueError, match="launches on cpu cannot overlap"):
        FusedStep(make("llama"), None, overlap=True)


@pytest.mark.gpu
@pytest.mark.parametrize("kind", [*KINDS, "ensemble"])
def test_captured_steps_are_as_exact_as_transformers_in_16_bits(kind, prompts):
    exact, model = (
        (ensemble(dtype) if kind == "ensemble" else make(kind, dtype)).cuda()
        for dtype in (torch.float32, torch.bfloat16)
    )
    decoders = {
        "exact": GraphDecoder(exact, batch=2, max_length=16, fused=False),
        "stock": GraphDecoder(model, batch=2, max_length=16, fused=False),
        "fused": GraphDecoder(model, batch=2, max_length=16),
    }
    assert decoders["fused"].not_fused == ""
    token = decoders["exact"].prefill(prompts).argmax(-1)
    for name in ("stock", "fused"):
        decoders[name].prefill(prompts)
    errors = {"stock": 0.0, "fused": 0.0}
    for _ in range(6):
        logits = {name: decoder.step(token).double() for name, decoder in decoders.items()}
        for name in errors:
            errors[name] += (logits[name] - logits["exact"]).square().sum().item()
        token = logits["exact"].argmax(-1)
    assert errors["fused"] <= KERNEL_ERROR_RATIO**2 * errors["stock"]
