"""Steps in the CPU library against the model's own forward over a cache."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn

import zoo
from loftq.integrations.cpu_decoder import CpuDecoder, why_no_cpu_decoder
from loftq.integrations.decode import GraphDecoder
from loftq.integrations.llama_like import NotReadable
from loftq.nn import pack_layer
from loftq.ops.cpu.library import ISA
from packed_folder import quantize
from tolerances import STEP_LOGITS

FAMILIES = ("llama", "llama-tied", "mistral", "qwen2", "qwen3")
TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
LENGTH = 24
pytestmark = pytest.mark.usefixtures("library")


def make(
    family: str, *, format_name: str | None = None, rank: int = 0, dtype: torch.dtype | None = None
) -> nn.Module:
    """A random model, on request with packed layers and an adapter that changes them."""
    model = zoo.build(family)
    generator = torch.Generator().manual_seed(1)
    for name, parameter in model.named_parameters():
        if parameter.dim() == 1:
            parameter.data += 0.3 * torch.randn(parameter.shape, generator=generator)
        elif "embed" not in name:
            parameter.data *= 5  # logits that are no noise
    model = model.to(dtype or torch.float32)
    for path, module in list(model.named_modules()) if format_name else ():
        if path.endswith(TARGETS):
            pack_layer(model, path, quantize(module.weight.data, format_name))
    if not rank:
        return model
    model = get_peft_model(model, LoraConfig(r=rank, lora_alpha=6, target_modules=list(TARGETS)))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data = 0.1 * torch.randn(parameter.shape, generator=generator)
    return model.eval()


def logits_of(decoder: Any, tokens: Tensor) -> Tensor:
    """Logits of the prompt's end and after each of four further tokens."""
    found = [decoder.prefill(tokens)]
    found += [decoder.step(torch.tensor([token])) for token in (5, 9, 40, 7)]
    return torch.cat([row.float() for row in found])


def check(model: nn.Module) -> None:
    """Logits within rounding, and the same text."""
    ours = CpuDecoder(model, max_length=LENGTH)
    plain = GraphDecoder(model, max_length=LENGTH)  # type: ignore[arg-type]
    tokens = zoo.tokens(1, 7)
    wanted = logits_of(plain, tokens)
    assert wanted.std() > 0.1
    assert (logits_of(ours, tokens) - wanted).abs().max() <= STEP_LOGITS
    text = ours.generate(tokens, max_new_tokens=LENGTH)
    assert torch.equal(text, plain.generate(tokens, max_new_tokens=LENGTH))


@pytest.mark.parametrize("family", FAMILIES)
def test_dense_models(family: str) -> None:
    check(make(family))


@pytest.mark.parametrize("family", FAMILIES)
def test_packed_models_with_adapters(family: str) -> None:
    check(make(family, format_name="nf2-g16", rank=5))


@pytest.mark.parametrize("format_name", ["nf3-g32-f16", "nf4-g64", "int2-g16", "sint8"])
def test_other_formats_and_a_rank_of_whole_vectors(format_name: str) -> None:
    check(make("llama", format_name=format_name, rank=16))


@pytest.mark.parametrize("threads", [1, 3])
def test_every_instruction_set_gives_the_same_text(
    library: Any, monkeypatch: pytest.MonkeyPatch, threads: int
) -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        for name in library.isas:
            monkeypatch.setenv(ISA, name)
            check(make("qwen3", format_name="nf2-g16", rank=5))
    finally:
        torch.set_num_threads(before)


def test_bfloat16_is_closer_to_float32_than_the_plain_path() -> None:
    model = make("llama", format_name="nf4-g16", dtype=torch.bfloat16)
    tokens = zoo.tokens(1, 7)
    ours = logits_of(CpuDecoder(model, max_length=LENGTH), tokens)[1:]
    plain = logits_of(GraphDecoder(model, max_length=LENGTH), tokens)[1:]  # type: ignore[arg-type]
    exact = logits_of(GraphDecoder(model.float(), max_length=LENGTH), tokens)[1:]  # type: ignore[arg-type]
    assert (ours - exact).norm() <= (plain - exact).norm()


def test_an_adapter_that_is_merged_or_gone_counts_from_the_next_prompt() -> None:
    model: Any = make("llama", format_name="nf4-g16", rank=5)
    decoder = CpuDecoder(model, max_length=LENGTH)
    tokens = zoo.tokens(1, 7)
    adapted = logits_of(decoder, tokens)
    bare = model.unload()
    wanted = logits_of(GraphDecoder(bare, max_length=LENGTH), tokens)
    assert (logits_of(decoder, tokens) - wanted).abs().max() <= STEP_LOGITS
    assert (adapted - wanted).abs().max() > 100 * STEP_LOGITS


def test_what_the_library_does_not_compute_is_refused_with_the_reason() -> None:
    assert why_no_cpu_decoder(zoo.build("llama")) == ""
    assert "Gemma2ForCausalLM is none" in why_no_cpu_decoder(zoo.build("gemma2"))
    sliding = zoo.build("mistral")
    sliding.config.sliding_window = 16
    assert "slides over 16 tokens, 24" in why_no_cpu_decoder(sliding, LENGTH)
    assert why_no_cpu_decoder(sliding, 16) == ""
    hooked = zoo.build("llama")
    hooked.model.layers[1].mlp.register_forward_hook(lambda *_: None)
    with pytest.raises(NotReadable, match=r"layers\.1\.mlp has hooks"):
        CpuDecoder(hooked, max_length=LENGTH)
    curved = zoo.build("llama")
    curved.config.hidden_act = "gelu"
    assert "gelu, not silu" in why_no_cpu_decoder(curved)


def test_room_is_checked() -> None:
    decoder = CpuDecoder(zoo.build("llama"), max_length=8)
    with pytest.raises(ValueError, match="prefill first"):
        decoder.step(torch.tensor([1]))
    with pytest.raises(ValueError, match=r"expected \(1, 1 to 7\)"):
        decoder.prefill(zoo.tokens(2, 3))
    decoder.prefill(zoo.tokens(1, 7))
    decoder.step(torch.tensor([1]))
    with pytest.raises(ValueError, match="8 of 8 tokens"):
        decoder.step(torch.tensor([1]))
