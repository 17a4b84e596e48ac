"""The short tuning behind the tables of quality: adapters over a frozen Q, the same for every row.

150 AdamW steps of 8 x 1024 tokens, 3e-4, cosine after 10 steps of warm-up, bfloat16 autocast on a
GPU.
"""

from __future__ import annotations

import copy
import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

STEPS, BATCH, LENGTH, RATE = 150, 8, 1024, 3e-4
PART = 4  # windows whose logits are in memory together


@dataclass
class Start:
    """One layer as it is before tuning."""

    Q: Tensor
    A: Tensor
    B: Tensor


class Lora(nn.Module):
    """y = x (Q + B A)^T + b with trainable A and B; alpha = rank."""

    def __init__(self, start: Start, bias: Tensor | None) -> None:
        super().__init__()
        self.register_buffer("bias", bias)
        self.register_buffer("Q", start.Q)
        self.A, self.B = nn.Parameter(start.A.clone()), nn.Parameter(start.B.clone())

    def forward(self, x: Tensor) -> Tensor:
        bias = None if self.bias is None else self.bias.to(x.dtype)
        return F.linear(x, self.Q.to(x.dtype), bias) + F.linear(F.linear(x, self.A), self.B)


def replaced(model: nn.Module, starts: dict[str, Start]) -> nn.Module:
    """A copy with frozen Q and trainable adapters."""
    model = copy.deepcopy(model).requires_grad_(False)
    for path, start in starts.items():
        parent, _, name = path.rpartition(".")
        bias = model.get_submodule(path).bias
        setattr(model.get_submodule(parent), name, Lora(start, bias))
    return model


def fresh(model: nn.Module, rank: int, seed: int) -> dict[str, Start]:
    """LoRA's own start over the dense weights of all blocks: A uniform, B zero."""
    generator, starts = torch.Generator().manual_seed(seed), {}
    for path, module in model.named_modules():
        if not (isinstance(module, nn.Linear) and ".layers." in path):
            continue
        W = module.weight.data
        A = torch.empty(rank, W.shape[1]).uniform_(-1, 1, generator=generator) / W.shape[1] ** 0.5
        starts[path] = Start(W, A.to(W.device), W.new_zeros(len(W), rank))
    return starts


def tune(model: nn.Module, ids: Tensor, seed: int) -> None:
    """The tuning that every row gets; windows from a generator of its own."""
    generator = torch.Generator().manual_seed(seed)
    adapter = [p for p in model.parameters() if p.requires_grad]
    optimizer, device = torch.optim.AdamW(adapter, lr=RATE, weight_decay=0.0), adapter[0].device
    for step in range(STEPS):
        rate = RATE * min(1, (step + 1) / 10) * 0.5 * (1 + math.cos(math.pi * step / STEPS))
        for group in optimizer.param_groups:
            group["lr"] = rate
        starts = torch.randint(0, len(ids) - LENGTH - 1, (BATCH,), generator=generator)
        windows = torch.stack([ids[s : s + LENGTH] for s in starts.tolist()]).to(device)
        optimizer.zero_grad(set_to_none=True)
        for part in windows.split(PART):
            with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
                logits = model(input_ids=part, use_cache=False).logits[:, :-1]
            loss = F.cross_entropy(logits.flatten(0, 1).float(), part[:, 1:].flatten())
            (loss * len(part) / BATCH).backward()
        nn.utils.clip_grad_norm_(adapter, 1.0)
        optimizer.step()
