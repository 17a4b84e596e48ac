"""Models of known shapes with random packed weights, made on the device they are trained on.

No 16-bit copy is ever made: the model is built on the meta device, its layers are packed there, and
the packed bytes are filled at random where they will be, with scales of a sane size.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
import transformers as hf
from peft import LoraConfig, get_peft_model
from torch import nn

from loftq.integrations.builders import BUILDERS
from loftq.integrations.tied import share_packed_
from loftq.nn import PackedLayer, packed_layers, replace_layer
from loftq.train.memory.subject import Subject, subject_of_config

SPREAD = 0.02
"""Size of a weight."""


def _qwen3(hidden: int, intermediate: int, layers: int, heads: int) -> hf.Qwen3Config:
    return hf.Qwen3Config(
        vocab_size=151936, hidden_size=hidden, intermediate_size=intermediate,
        num_hidden_layers=layers, num_attention_heads=heads, num_key_value_heads=8, head_dim=128,
        max_position_embeddings=40960, tie_word_embeddings=False,
    )  # fmt: skip


SHAPES: dict[str, Any] = {
    "Llama-2-7B": lambda: hf.LlamaConfig(
        vocab_size=32000, hidden_size=4096, intermediate_size=11008, num_hidden_layers=32,
        num_attention_heads=32, max_position_embeddings=4096, tie_word_embeddings=False,
    ),
    "Qwen3-8B": lambda: _qwen3(4096, 12288, 36, 32),
    "Qwen3-14B": lambda: _qwen3(5120, 17408, 40, 40),
    "Qwen3-32B": lambda: _qwen3(5120, 25600, 64, 64),
    "tiny": lambda: hf.Qwen3Config(
        vocab_size=40000, hidden_size=128, intermediate_size=384, num_hidden_layers=4,
        num_attention_heads=4, num_key_value_heads=2, head_dim=32, tie_word_embeddings=False,
    ),
}  # fmt: skip


def subject(shape: str, **options: Any) -> Subject:
    """The model of that shape for the memory model; options as of `quantize`."""
    return subject_of_config(SHAPES[shape](), name=shape, **options)


def random_model(shape: str, described: Subject, *, device: str, dtype: torch.dtype) -> nn.Module:
    """The packed base model with random weights on `device`."""
    config = SHAPES[shape]()
    with torch.device("meta"):
        model = hf.AutoModelForCausalLM.from_config(copy.deepcopy(config)).to(dtype)
        for weight in described.weights:
            replace_layer(model, weight.info.module, weight.spec, builders=BUILDERS)
        share_packed_(model)
    model.to_empty(device=device)
    _fill(model, device)
    return model.requires_grad_(False)


def dense_model(shape: str, *, device: str, dtype: torch.dtype) -> nn.Module:
    """The same model, not packed."""
    with torch.device("meta"):
        model = hf.AutoModelForCausalLM.from_config(SHAPES[shape]()).to(dtype)
    model.to_empty(device=device)
    _fill(model, device)
    return model.requires_grad_(False)


def with_adapter(model: nn.Module, described: Subject, rank: int) -> nn.Module:
    """A PEFT model around `model` with fresh adapters of one rank, float32."""
    targets = [w.info.module for w in described.weights if w.rank]
    return get_peft_model(model, LoraConfig(r=rank, lora_alpha=rank, target_modules=targets))


@torch.no_grad()
def _fill(model: nn.Module, device: str) -> None:
    packed = set(packed_layers(model).values())
    for module in model.modules():
        if module in packed:
            _fill_packed(module)
        elif hasattr(module, "inv_freq"):  # buffers that no checkpoint holds
            with torch.device(device):
                fresh = type(module)(model.config)
            for name, buffer in fresh.named_buffers():
                setattr(module, name, buffer)
        else:
            for name, parameter in module.named_parameters(recurse=False):
                if parameter.dim() > 1:
                    parameter.normal_(0, SPREAD)
                else:
                    parameter.fill_(0.0 if "bias" in name else 1.0)


def _fill_packed(layer: PackedLayer) -> None:
    layer.weight_packed.random_(0, 256)
    if layer.weight_nested is not None:
        layer.weight_scale.random_(0, 256)
        constants = torch.full((layer.weight_nested.numel() // 4,), SPREAD / 8)
        constants[0] = SPREAD  # scale = map[byte] * constant + this one
        layer.weight_nested.copy_(constants.view(torch.uint8))
        return
    codings = {"f16": torch.float16, "bf16": torch.bfloat16, "f32": torch.float32}
    dtype = codings[layer.spec.scale_coding]
    count = layer.weight_scale.numel() // dtype.itemsize
    top = 2 ** (layer.spec.bits - 1)
    scales = torch.full((count,), SPREAD / (top if layer.spec.grid == "sint" else 1), dtype=dtype)
    layer.weight_scale.copy_(scales.view(torch.uint8).view(layer.weight_scale.shape))
