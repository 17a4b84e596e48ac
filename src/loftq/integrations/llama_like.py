"""A Llama-like model as the tensors that one C call per token needs, or why it is none.

Which models count is said in families.py; here it is seen whether the library holds their formats,
and everything that the call reads is collected.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from loftq.integrations.families import READ_ONE_INPUT, why_no_family, without_peft
from loftq.integrations.inference import active_adapter, why_not_folded, why_turned
from loftq.nn import QuantLinear
from loftq.ops.cpu.decoder import BlockTensors, Linear, ModelTensors
from loftq.ops.cpu.library import BITS, DTYPES, SCALES
from loftq.ops.reference import PER_TENSOR

ROTATIONS = ("default", "linear", "llama3", "yarn")
"""Kinds of rotary embedding whose frequencies do not depend on the length so far."""
ATTENTION = (*READ_ONE_INPUT, "o_proj")
MLP = ("gate_proj", "up_proj", "down_proj")


class NotReadable(RuntimeError):
    """The model computes something that the library's step does not; the message says what."""


@torch.no_grad()
def read_model(model: Any, capacity: int) -> ModelTensors:
    """The tensors of a causal language model, bare or in PEFT, as they are now.

    Packed and dense weights, adapters and biases are shared, not copied; norms become float32.

    Args:
        model: on the CPU, in eval mode.
        capacity: positions that the rotation is tabulated for.

    Raises:
        NotReadable: another family, or a part of it that the library does not compute.
    """
    base = without_peft(model)
    _check(base, capacity)
    config, inner = base.config, base.model
    blocks = [_block(layer) for layer in inner.layers[: config.num_hidden_layers]]
    positions = torch.arange(capacity)[None]
    cosine, sine = inner.rotary_emb(torch.empty(0), positions)
    return ModelTensors(
        blocks=blocks,
        norm=_float(inner.norm.weight),
        head=_linear("lm_head", base.lm_head),
        cosine=cosine[0].contiguous(),
        sine=sine[0].contiguous(),
        epsilon=inner.norm.variance_epsilon,
        scaling=inner.layers[0].self_attn.scaling,
    )


def _check(base: Any, capacity: int) -> None:
    devices = {parameter.device.type for parameter in base.parameters()}
    if devices != {"cpu"}:
        raise NotReadable(f"it lies on {', '.join(sorted(devices))}, not on the CPU")
    if why := why_no_family(base, capacity):
        raise NotReadable(why)
    kind = base.config.rope_parameters["rope_type"]
    if kind not in ROTATIONS:
        raise NotReadable(f"its rotation is {kind}, none of {', '.join(ROTATIONS)}")


def _block(layer: Any) -> BlockTensors:
    attention, mlp = layer.self_attn, layer.mlp
    norms = (attention.q_norm, attention.k_norm) if hasattr(attention, "q_norm") else None
    linears = [_linear(name, getattr(attention, name)) for name in ATTENTION]
    linears += [_linear(name, getattr(mlp, name)) for name in MLP]
    return BlockTensors(
        attention_norm=_float(layer.input_layernorm.weight),
        mlp_norm=_float(layer.post_attention_layernorm.weight),
        head_norms=norms and (_float(norms[0].weight), _float(norms[1].weight)),
        linears=linears,
    )


def _linear(name: str, module: Any) -> Linear:
    """One layer: packed or dense, bare or with one plain LoRA adapter."""
    adapter = None
    if hasattr(module, "base_layer"):
        if why := why_not_folded(module):
            raise NotReadable(f"{name}: {why}")
        active = active_adapter(module)
        A, B = module.lora_A[active].weight, module.lora_B[active].weight
        adapter = A.detach(), B.detach(), module.scaling[active]
        module = module.base_layer
    parts, layout = _stored(name, module)
    bias = None if module.bias is None else module.bias.detach()
    for tensor in (*(adapter or ())[:2], bias):
        if tensor is not None and (tensor.dtype not in DTYPES or not tensor.is_contiguous()):
            raise NotReadable(f"{name}: a tensor of {tensor.dtype}, or one that is not contiguous")
    if adapter and adapter[0].dtype != adapter[1].dtype:
        raise NotReadable(f"{name}: its adapter has two dtypes")
    return Linear(
        parts=parts, in_features=module.in_features, layout=layout, adapter=adapter, bias=bias
    )


def _stored(name: str, module: nn.Module) -> tuple[list[Tensor | None], tuple | None]:
    """Packed parts with their layout, or the dense weight with None."""
    if type(module) is nn.Linear:
        weight = module.weight.detach()
        if weight.dtype not in DTYPES or not weight.is_contiguous():
            raise NotReadable(f"{name}: a weight of {weight.dtype}, or one that is not contiguous")
        return [weight], None
    if type(module) is not QuantLinear:
        raise NotReadable(f"{name} is a {type(module).__name__}")
    if why := why_turned(module):
        raise NotReadable(f"{name}: {why}")
    bits, group_size, coding, levels, default_zero = module.layout
    if bits not in BITS or group_size == PER_TENSOR or coding not in SCALES:
        raise NotReadable(f"{name}: {module.spec} is no format of the library")
    stored = (module.weight_packed, module.weight_scale, module.weight_zero, module.weight_nested)
    parts = [
        None if part is None else part.detach().to(torch.uint8).contiguous() for part in stored
    ]
    return parts, (bits, group_size, coding, tuple(levels), default_zero)


def _float(tensor: Tensor) -> Tensor:
    return tensor.detach().float().contiguous()
