"""One decoded token in a quarter of the launches: transformers' layers from our own kernels.

A layer of Llama takes transformers and PEFT about sixty launches for a token, of which most move a
few thousand values. Here it takes ten (fourteen with Triton's product): q, k, v in one packed
product with their adapters, gate and up in another, and small kernels between (ops/decoding.py).
Weights, adapters and the static cache are the model's own; nothing is copied and the model stays as
it is. Members of an ensemble (members.py) take the same launches: their sequences go side by side.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from loftq.integrations.families import READ_ONE_INPUT, why_no_family, without_peft
from loftq.integrations.guard import is_guard
from loftq.integrations.inference import active_adapter, why_not_folded, why_turned
from loftq.integrations.members import averaged_members, is_average, log_mean
from loftq.nn import QuantLinear
from loftq.nn.members import MemberLinear
from loftq.ops import decoding
from loftq.ops.dispatch import may_overlap
from loftq.ops.few_tokens import Member
from loftq.ops.groups import linears

MOST_QUERIES = 16  # query heads of one key head: rows of the attention kernel


@dataclass(frozen=True, kw_only=True)
class _Layer:
    input_norm: tuple[Tensor, float]
    qkv: tuple[Member, ...]
    bias: Tensor | None
    head_norms: tuple[Tensor, Tensor, float] | None
    scaling: float
    out: Member
    middle_norm: tuple[Tensor, float]
    gate_up: tuple[Member, ...]
    down: Member


def why_not_fused(model: Any) -> str:
    """Reason that transformers' own forward decodes this model's tokens, or ""."""
    base = without_peft(model)
    if why := why_no_family(base, known=_known):
        return why
    attention = base.model.layers[0].self_attn
    if attention.head_dim not in (32, 64, 128, 256):
        return f"heads of {attention.head_dim} dimensions: the kernel holds 32, 64, 128 and 256"
    if attention.num_key_value_groups > MOST_QUERIES:
        groups = attention.num_key_value_groups
        return f"{groups} query heads share a key head: the kernel holds {MOST_QUERIES}"
    for path, module in base.model.layers.named_modules():
        name = path.rsplit(".", 1)[-1]
        if name.endswith("_proj") and (why := _why_no_member(name, module)):
            return f"layers.{path}: {why}"
    return ""


class FusedStep:
    """Logits of the token after the newest one, and its row in the cache.

    Args:
        model: one that `why_not_fused` has nothing against, in eval mode.
        cache: a static cache of transformers', filled by a prefill of the same model.
        overlap: whether the small kernels, too, start while the ones before them end. Faster
            (docs/kernels.md), but its logits were not compared on a GPU yet.

    Raises:
        ValueError: overlap on a device without such launches.
    """

    def __init__(self, model: Any, cache: Any, *, overlap: bool = False) -> None:
        base = without_peft(model)
        self.model, self.head, self.cache = base.model, base.lm_head, cache
        self.layers = [_read(layer) for layer in self.model.layers]
        device = self.model.embed_tokens.weight.device
        if overlap and not may_overlap(device):
            raise ValueError(f"overlap=True: launches on {device} cannot overlap; leave it off.")
        self.overlap = overlap
        self.members = averaged_members(base)

    @torch.no_grad()
    def __call__(self, tokens: Tensor) -> Tensor:
        """(batch, 1) token ids -> logits (batch, vocab), of members log of the mean."""
        caches, tokens = self.cache.layers, tokens.repeat(self.members, 1)
        position = caches[0].cumulative_length
        x = self.model.embed_tokens(tokens)
        cos, sin = self.model.rotary_emb(x, position_ids=position.view(1, 1))
        angles, x = (cos.flatten(), sin.flatten()), x.flatten(0, 1)
        delta = None
        for layer, cache in zip(self.layers, caches, strict=True):
            x, delta = self._layer(layer, x, delta, angles, (cache.keys, cache.values), position)
        final = self.model.norm
        _, x = decoding.add_norm(
            x, delta, final.weight, final.variance_epsilon, overlap=self.overlap
        )
        torch._foreach_add_([cache.cumulative_length for cache in caches], 1)
        logits = self.head(x)
        return logits if self.members == 1 else log_mean(logits, self.members)

    def _layer(
        self,
        layer: _Layer,
        x: Tensor,
        delta: Tensor | None,
        angles: tuple[Tensor, Tensor],
        cache: tuple[Tensor, Tensor],
        position: Tensor,
    ) -> tuple[Tensor, Tensor]:
        """(residual stream, what is still to be added to it) behind the layer."""
        overlap = self.overlap
        x, h = decoding.add_norm(x, delta, *layer.input_norm, overlap=overlap)
        h = linears(h, layer.qkv, overlap=overlap)
        q = decoding.rotate_and_store(
            h, layer.bias, *angles, layer.head_norms, *cache, position, overlap=overlap
        )
        h = decoding.attend(q, *cache, position, layer.scaling, overlap=overlap)
        h = linears(h, (layer.out,), overlap=overlap)
        x, h = decoding.add_norm(x, h, *layer.middle_norm, overlap=overlap)
        h = decoding.swiglu(linears(h, layer.gate_up, overlap=overlap), overlap=overlap)
        return x, linears(h, (layer.down,), overlap=overlap)


def _read(layer: Any) -> _Layer:
    attention, mlp = layer.self_attn, layer.mlp
    norms = None
    if hasattr(attention, "q_norm"):
        q_norm, k_norm = attention.q_norm, attention.k_norm
        norms = (q_norm.weight, k_norm.weight, q_norm.variance_epsilon)
    projections = [_packed(getattr(attention, name)) for name in READ_ONE_INPUT]
    return _Layer(
        input_norm=(layer.input_layernorm.weight, layer.input_layernorm.variance_epsilon),
        qkv=tuple(_member(getattr(attention, name)) for name in READ_ONE_INPUT),
        bias=_bias(projections),
        head_norms=norms,
        scaling=attention.scaling,
        out=_member(attention.o_proj),
        middle_norm=(
            layer.post_attention_layernorm.weight, layer.post_attention_layernorm.variance_epsilon,
        ),
        gate_up=(_member(mlp.gate_proj), _member(mlp.up_proj)),
        down=_member(mlp.down_proj),
    )  # fmt: skip


def _bias(layers: list[QuantLinear]) -> Tensor | None:
    """Biases side by side, None if there is none."""
    if all(layer.bias is None for layer in layers):
        return None
    zeros = layers[0].weight_packed.new_zeros
    return torch.cat([
        zeros(layer.out_features, dtype=layer.compute_dtype) if layer.bias is None else layer.bias
        for layer in layers
    ])  # fmt: skip


def _known(hook: object) -> bool:
    return is_guard(hook) or is_average(hook)


def _packed(module: Any) -> QuantLinear:
    name = "base" if isinstance(module, MemberLinear) else "base_layer"
    return getattr(module, name, module)


def _member(module: Any) -> Member:
    base = _packed(module)
    stored = (base.weight_packed, base.weight_scale, base.weight_zero, base.weight_nested)
    if base is module:
        return Member(*stored, base.layout)
    if isinstance(module, MemberLinear):
        return Member(*stored, base.layout, module.stacked_A, module.stacked_B, 1.0, module.members)
    name = active_adapter(module)
    A, B = module.lora_A[name].weight, module.lora_B[name].weight
    return Member(*stored, base.layout, A, B, module.scaling[name])


def _why_no_member(name: str, module: nn.Module) -> str:
    base: Any = _packed(module)
    if type(base) is not QuantLinear:
        return f"{type(base).__name__} is no packed linear layer"
    if why := why_turned(base):
        return why
    adapted = base is not module and not isinstance(module, MemberLinear)
    if adapted and (why := why_not_folded(module)):
        return why
    if base.bias is not None and name not in READ_ONE_INPUT:
        return "it has a bias, the kernels add those of q, k and v"
    return ""
