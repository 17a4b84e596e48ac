"""Milliseconds per token of a Llama-2-7B shape: packed with unmerged adapters against bf16.

    python benchmarks/ops/bench_decode.py [--formats bf16 nf4 nf3 nf2] [--rank 64] [--context 1024]
        [--batch 1] [--layers 32] [--kinds stock folded fused overlapping]

Every row decodes greedily from transformers' static cache, one CUDA graph a step
(loftq.integrations.decode): `stock` through PEFT's layers, `folded` after `prepare_for_inference`,
`fused` from our own layers (fused_step.py), `overlapping` the same with launches that start while
the ones before them end. Weights are random: speed does not depend on them. bf16 is the dense model
without adapter, bnb is bitsandbytes' NF4 with the same adapter in PEFT's layers. Median, p20 and
p80 of the steps between events, the next token chosen on the device.
"""

from __future__ import annotations

import argparse
import gc
from itertools import pairwise
from typing import Any

import torch
from torch import nn

from loftq.formats import component_shapes, parse_format
from loftq.integrations.decode import GraphDecoder
from loftq.integrations.inference import prepare_for_inference
from loftq.nn import QuantLinear

TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
DEVICE = "cuda"
KINDS = ("stock", "folded", "fused", "overlapping", "early")


def random_layer(shape: tuple[int, int], name: str) -> QuantLinear:
    """Uniform codes under small scales."""
    rows, columns = shape
    layer = QuantLinear(
        columns, rows, parse_format(name), bias=False, dtype=torch.bfloat16, device="cuda"
    )
    for part, size in component_shapes(layer.spec, shape).items():
        stored = torch.randint(0, 256, size, dtype=torch.uint8, device="cuda")
        if part == "weight_nested":
            constants = 1e-3 * torch.rand(size[0] // 4, dtype=torch.float32, device="cuda")
            constants[0] = 0.02
            stored = constants.view(torch.uint8)
        getattr(layer, part).data = stored
    return layer


def bnb_layer(shape: tuple[int, int], name: str) -> nn.Module:
    """bitsandbytes' NF4 layer of random values, nested absmax."""
    from bitsandbytes.functional import quantize_4bit
    from bitsandbytes.nn import Linear4bit, Params4bit

    values = 0.02 * torch.randn(shape, device=DEVICE).bfloat16()
    codes, state = quantize_4bit(values, quant_type="nf4", blocksize=64, compress_statistics=True)
    layer = Linear4bit(
        shape[1], shape[0], bias=False, compute_dtype=torch.bfloat16, quant_type="nf4",
        device="meta",
    )  # fmt: skip
    layer.weight = Params4bit(
        codes, requires_grad=False, quant_state=state, blocksize=64, quant_type="nf4",
        module=layer, bnb_quantized=True,
    )  # fmt: skip
    layer.quant_state = state
    return layer


def make_model(name: str, layers: int, rank: int) -> nn.Module:
    """A Llama-2-7B shape with random weights; packed ones get a random adapter."""
    from peft import LoraConfig, get_peft_model
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        hidden_size=4096, intermediate_size=11008, num_hidden_layers=layers,
        num_attention_heads=32, num_key_value_heads=32, vocab_size=32000,
        max_position_embeddings=4096, attn_implementation="sdpa",
    )  # fmt: skip
    torch.set_default_dtype(torch.bfloat16)
    with torch.device("cuda" if name == "bf16" else "meta"):
        model = LlamaForCausalLM(config).eval()
    if name != "bf16":
        for path, module in list(model.named_modules()):
            if isinstance(module, nn.Linear) and path.rsplit(".", 1)[-1] in TARGETS:
                make = bnb_layer if name == "bnb" else random_layer
                model.set_submodule(path, make(tuple(module.weight.shape), name))
        for module in model.modules():
            for key, parameter in list(module._parameters.items()):
                if parameter is not None and parameter.is_meta:
                    filled = 0.02 * torch.randn(parameter.shape, device="cuda")
                    module._parameters[key] = nn.Parameter(filled.bfloat16(), requires_grad=False)
        with torch.device("cuda"):  # its buffers are computed, not drawn
            model.model.rotary_emb = type(model.model.rotary_emb)(config)
        options = LoraConfig(r=rank, target_modules=TARGETS, init_lora_weights=False)
        model = get_peft_model(model, options).eval().to("cuda", torch.bfloat16)
    torch.set_default_dtype(torch.float32)
    return model


def make_decoder(model: Any, batch: int, length: int, kind: str) -> GraphDecoder:
    """A decoder whose layers run as `kind` says."""
    fused = kind in ("fused", "overlapping", "early")
    from loftq.ops.triton import overlap

    overlap.EARLY = kind == "early"
    decoder = GraphDecoder(model, batch=batch, max_length=length, fused=fused)
    if fused:
        assert not decoder.not_fused, decoder.not_fused
        assert decoder._fused is not None
        decoder._fused.overlap = kind in ("overlapping", "early")
    return decoder


def step_times(
    model: nn.Module, batch: int, context: int, steps: int, kind: str
) -> tuple[float, ...]:
    """(median, p20, p80) milliseconds of a decoding step after `context` tokens."""
    decoder = make_decoder(model, batch, context + steps + 8, kind)
    token = decoder.prefill(torch.randint(0, 32000, (batch, context))).argmax(-1)
    for _ in range(5):
        token = decoder.step(token).argmax(-1)
    events = [torch.cuda.Event(enable_timing=True) for _ in range(steps + 1)]
    events[0].record()
    for event in events[1:]:
        token = decoder.step(token).argmax(-1)
        event.record()
    torch.cuda.synchronize()
    times = sorted(a.elapsed_time(b) for a, b in pairwise(events))
    return times[steps // 2], times[steps // 5], times[-steps // 5]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--formats", nargs="+", default=["bf16", "nf4", "nf3", "nf2"])
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=KINDS)
    parser.add_argument("--rank", type=int, default=64)
    parser.add_argument("--context", type=int, default=1024)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--steps", type=int, default=50)
    args = parser.parse_args()
    print("| weights | adapter | layers | batch | ms/token | p20 | p80 | allocated, GB |")
    print("|---|---|---|--:|--:|--:|--:|--:|", flush=True)
    for name in args.formats:
        model = make_model(name, args.layers, args.rank)
        for kind in {"bf16": ("dense",), "bnb": ("stock",)}.get(name, args.kinds):
            if kind == "folded":
                assert not prepare_for_inference(model).left
            allocated = torch.cuda.memory_allocated() / 1e9
            times = step_times(model, args.batch, args.context, args.steps, kind)
            adapter = "none" if name == "bf16" else f"r={args.rank}"
            numbers = " | ".join(f"{t:.2f}" for t in times)
            print(
                f"| {name} | {adapter} | {kind} | {args.batch} | {numbers} | {allocated:.1f} |",
                flush=True,
            )
            gc.collect()
        del model
        gc.collect()
        torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
