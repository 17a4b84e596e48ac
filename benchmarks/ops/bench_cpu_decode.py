"""Tokens a second of a small model on a CPU: packed with adapters, against 16 and 32 bits.

    python benchmarks/ops/bench_cpu_decode.py MODEL [--format nf2-g64] [--rank 64] [--threads 2]
        [--context 64] [--tokens 32] [--rounds 7]

MODEL is a dense Llama-like model (SmolLM2-135M). Its weights are rounded to the format, adapters
are random: speed does not depend on their values. Every row decodes the same tokens from the same
context at batch 1. The rows take turns, round after round, so that what else the machine does
meets all of them; the table gives the best and the median round. `transformers` is the model's
own forward over a dynamic cache, one token after the other, without the bookkeeping of `generate`;
`step` is one call of the CPU library. Before timing, each packed row must agree with the plain path
of the same model.
"""

from __future__ import annotations

import argparse
import os
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor
from transformers import AutoModelForCausalLM, DynamicCache

from loftq.formats import parse_format
from loftq.integrations.cpu_decoder import CpuDecoder
from loftq.integrations.inference import prepare_for_inference
from loftq.nn import pack_layer
from loftq.rounding import round_to_nearest

TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
AGREEMENT = {torch.float32: 1e-3, torch.bfloat16: 0.1}
"""Largest error of the logits against the plain path, relative to their norm."""


class Plain:
    """transformers' own forward over a dynamic cache, with the interface of a decoder."""

    def __init__(self, model: Any) -> None:
        self.model = model

    @torch.no_grad()
    def prefill(self, tokens: Tensor) -> Tensor:
        self.cache = DynamicCache()
        return self.step(tokens)

    @torch.no_grad()
    def step(self, tokens: Tensor) -> Tensor:
        ids = tokens.view(1, -1)
        out = self.model(input_ids=ids, past_key_values=self.cache, logits_to_keep=1)
        return out.logits[:, -1]


def packed(path: str, args: argparse.Namespace, dtype: torch.dtype) -> Any:
    """The model with packed layers and adapters in its dtype."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_pretrained(path, dtype=dtype).eval()
    spec = parse_format(args.format)
    for name, module in list(model.named_modules()):
        if name.endswith(TARGETS):
            weight = round_to_nearest(module.weight.data[None].float(), spec, fit="absmax")[0].pack(
                0
            )
            pack_layer(model, name, weight)
    if not args.rank:
        return model
    options = {"r": args.rank, "lora_alpha": args.rank, "target_modules": list(TARGETS)}
    model = get_peft_model(model, LoraConfig(**options), autocast_adapter_dtype=False).eval()
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data = 0.01 * torch.randn(parameter.shape).to(dtype)
    prepare_for_inference(model)
    return model


def rows(args: argparse.Namespace) -> dict[str, Any]:
    """Name -> decoder."""
    length = args.context + args.tokens + 2
    found: dict[str, Any] = {}
    for name, dtype in (("bf16", torch.bfloat16), ("f32", torch.float32)):
        dense = AutoModelForCausalLM.from_pretrained(args.model, dtype=dtype).eval()
        found[f"{name} dense, transformers"] = Plain(dense)
        found[f"{name} dense, step"] = CpuDecoder(dense, max_length=length)
        model = packed(args.model, args, dtype)
        label = f"{name} {args.format}, rank {args.rank}"
        found[f"{label}, transformers"] = Plain(model)
        found[f"{label}, step"] = CpuDecoder(model, max_length=length)
    return found


def run(decoder: Any, prompt: Tensor, following: Tensor) -> tuple[float, Tensor]:
    """(seconds of a token, logits after the last)."""
    decoder.prefill(prompt)
    decoder.step(following[:1])
    begun = time.perf_counter()
    for i in range(1, len(following)):
        logits = decoder.step(following[i : i + 1])
    return (time.perf_counter() - begun) / (len(following) - 1), logits.float()


def check(found: dict[str, Any], last: Callable[[str], Tensor]) -> None:
    """Each step row agrees with the transformers row of the same model."""
    for name in found:
        if name.endswith(", step"):
            wanted, ours = last(name.removesuffix("step") + "transformers"), last(name)
            error = float((ours - wanted).norm() / wanted.norm())
            dtype = torch.bfloat16 if name.startswith("bf16") else torch.float32
            if error > AGREEMENT[dtype]:
                raise SystemExit(f"{name}: logits are off by {error:.2g} of their norm")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("model")
    parser.add_argument("--format", default="nf2-g64")
    parser.add_argument("--rank", type=int, default=64)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--context", type=int, default=64)
    parser.add_argument("--tokens", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=7)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(100, 10_000, (args.context + args.tokens + 1,), generator=generator)
    prompt, following = ids[None, : args.context], ids[args.context :]
    found = rows(args)
    logits = {name: run(decoder, prompt, following)[1] for name, decoder in found.items()}
    check(found, logits.__getitem__)
    times: dict[str, list[float]] = {name: [] for name in found}
    load = [os.getloadavg()[0]]
    for _ in range(args.rounds):
        for name, decoder in found.items():
            times[name].append(run(decoder, prompt, following)[0])
    load.append(os.getloadavg()[0])
    print(f"torch {torch.__version__}, {args.threads} threads, load {load[0]:.1f} to {load[1]:.1f}")
    print(f"context {args.context}, {args.tokens} tokens, {args.rounds} rounds")
    first = times["bf16 dense, transformers"]
    print("| model | tokens a second, best | median | times the first row, best | median |")
    print("|---|--:|--:|--:|--:|")
    for name, own in times.items():
        best, middle = min(own), statistics.median(own)
        print(
            f"| {name} | {1 / best:.1f} | {1 / middle:.1f} | {min(first) / best:.2f} | "
            f"{statistics.median(first) / middle:.2f} |"
        )


if __name__ == "__main__":
    main()
