"""A packed model folder without the pipeline: plain rounding of a tiny model, written by hand."""

from __future__ import annotations

import copy
import hashlib
import json
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import nn

from loftq.formats import QuantizedTensor, parse_format
from loftq.rounding import round_to_nearest

INDEX = "loftq.safetensors.index.json"


def quantize(weight: torch.Tensor, name: str = "nf4-g32") -> QuantizedTensor:
    """Round one weight (out, in) to nearest."""
    return round_to_nearest(weight[None].float(), parse_format(name), fit="absmax")[0].pack(0)


def random_quantized(rows: int, columns: int, name: str, seed: int = 0) -> QuantizedTensor:
    """A random packed weight."""
    generator = torch.Generator().manual_seed(seed)
    return quantize(torch.randn(rows, columns, generator=generator), name)


def pack_model(
    model: nn.Module, name: str, embeddings: bool
) -> tuple[nn.Module, dict[str, QuantizedTensor]]:
    """A dense copy with rounded weights, and the packed weights by module path."""
    from transformers.pytorch_utils import Conv1D

    dense, packed = copy.deepcopy(model), {}
    head = dense.get_output_embeddings() if hasattr(dense, "get_output_embeddings") else None
    for path, module in dense.named_modules():
        transposed = isinstance(module, Conv1D)
        kinds = (nn.Linear, Conv1D, nn.Embedding) if embeddings else (nn.Linear, Conv1D)
        if not isinstance(module, kinds) or module is head:
            continue
        weight = module.weight.data
        packed[path] = quantize(weight.T if transposed else weight, name)
        values = packed[path].dequantize(weight.dtype)
        module.weight.data = values.T.contiguous() if transposed else values
    return dense, packed


def write_packed(
    model: nn.Module,
    folder: Path,
    name: str = "nf4-g32",
    *,
    shards: int = 1,
    adapter_required: bool = False,
    embeddings: bool = False,
) -> nn.Module:
    """Write the folder. Returns the dense model that it stands for."""
    folder.mkdir(parents=True, exist_ok=True)
    dense, packed = pack_model(model, name, embeddings)
    tied = set(getattr(model, "all_tied_weights_keys", None) or {})
    tensors = {
        key: value.contiguous()
        for key, value in dense.state_dict().items()
        if key.removesuffix(".weight") not in packed and key not in tied
    }
    for path, weight in packed.items():
        tensors |= {f"{path}.{part}": t.clone() for part, t in weight.to_state_dict().items()}
    weight_map = {}
    for i in range(shards):
        file = f"loftq-{i + 1:05d}-of-{shards:05d}.safetensors"
        part = {key: tensors[key] for key in sorted(tensors)[i::shards]}
        save_file(part, folder / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(part, file)
    index = {"metadata": {}, "weight_map": weight_map}
    (folder / INDEX).write_text(json.dumps(index))
    bytes_of_all = b"".join(tensors[k].numpy().tobytes() for k in sorted(tensors) if "weight_" in k)
    model.config.architectures = [type(model).__name__]
    config = {
        **model.config.to_dict(),
        "dtype": str(model.dtype).removeprefix("torch."),
        "quantization_config": {
            "quant_method": "loftq",
            "version": 1,
            "weights": INDEX,
            "layers": {
                path: {"format": str(w.spec), "shape": list(w.shape)} for path, w in packed.items()
            },
            "modules_to_not_convert": [],
            "backbone": hashlib.sha256(bytes_of_all).hexdigest(),
            "adapter_required": adapter_required,
        },
    }
    (folder / "config.json").write_text(json.dumps(config))
    return dense


def tiny_llama(*, tied: bool = False, dtype: torch.dtype = torch.float32) -> nn.Module:
    """A two-layer random Llama."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=48, intermediate_size=80, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, vocab_size=97, max_position_embeddings=64, tie_word_embeddings=tied,
        attention_bias=True, pad_token_id=0, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    model = LlamaForCausalLM(config).eval().to(dtype)
    for parameter in model.parameters():
        if parameter.dim() == 1:
            torch.nn.init.normal_(parameter, std=0.1)
    return model
