"""The short tuning behind the tables of quality: adapters over a frozen Q, the same for every row.

150 AdamW steps of 8 x 1024 tokens, 3e-4, cosine after 10 steps of warm-up, bfloat16 autocast on a
GPU. There, eager PyTorch keeps the GPU waiting for the host three quarters of the time with a model
of 135 M weights: `captured` records forward and backward once as a CUDA graph and replays it.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

STEPS, BATCH, LENGTH, RATE = 150, 8, 1024, 3e-4
PART = 4  # windows whose logits are in memory together

Gradients = Callable[[Tensor], object]
"""Leaves the gradients of the mean loss over windows (BATCH, LENGTH) in the adapters."""


@dataclass
class Start:
    """One layer as it is before tuning."""

    Q: Tensor
    A: Tensor
    B: Tensor


class Lora(nn.Module):
    """y = x (Q + B A)^T with trainable A and B; alpha = rank."""

    def __init__(self, start: Start) -> None:
        super().__init__()
        self.register_buffer("Q", start.Q)
        self.A, self.B = nn.Parameter(start.A.clone()), nn.Parameter(start.B.clone())

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.Q.to(x.dtype)) + F.linear(F.linear(x, self.A), self.B)


def replaced(model: nn.Module, starts: dict[str, Start]) -> nn.Module:
    """A copy with frozen Q and trainable adapters."""
    model = copy.deepcopy(model).requires_grad_(False)
    for path, start in starts.items():
        parent, _, name = path.rpartition(".")
        setattr(model.get_submodule(parent), name, Lora(start))
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


def tune(model: nn.Module, ids: Tensor, seed: int, *, capture: bool = False) -> None:
    """The tuning that every row gets; windows from a generator of its own.

    Args:
        model: of `replaced`, in training mode.
        ids: (n,) tokens of the text.
        seed: of the windows.
        capture: replay a CUDA graph; the same arithmetic, but attention is given a mask.
    """
    generator = torch.Generator().manual_seed(seed)
    adapter = [p for p in model.parameters() if p.requires_grad]
    optimizer, device = torch.optim.AdamW(adapter, lr=RATE, weight_decay=0.0), adapter[0].device
    gradients = captured(model, adapter) if capture else eager(model, adapter)
    for step in range(STEPS):
        rate = RATE * min(1, (step + 1) / 10) * 0.5 * (1 + math.cos(math.pi * step / STEPS))
        for group in optimizer.param_groups:
            group["lr"] = rate
        starts = torch.randint(0, len(ids) - LENGTH - 1, (BATCH,), generator=generator)
        gradients(torch.stack([ids[s : s + LENGTH] for s in starts.tolist()]).to(device))
        nn.utils.clip_grad_norm_(adapter, 1.0)
        optimizer.step()


def eager(model: nn.Module, adapter: list[nn.Parameter]) -> Gradients:
    """Forward and backward as they are written."""

    def gradients(windows: Tensor) -> None:
        clear(adapter)
        backward(model, windows)

    return gradients


def captured(model: nn.Module, adapter: list[nn.Parameter]) -> Gradients:
    """Forward and backward recorded once on the GPU; gradients stay where they were recorded."""
    device = adapter[0].device
    windows = torch.zeros(BATCH, LENGTH, dtype=torch.long, device=device)
    # transformers asks the device whether rows are packed, which cannot be recorded, unless it is
    # given a mask of four dimensions.
    mask = torch.ones(1, 1, LENGTH, LENGTH, dtype=torch.bool, device=device).tril()
    mask = mask.expand(PART, 1, LENGTH, LENGTH)
    side = torch.cuda.Stream(device)
    side.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(side):  # what is made at the first call is not to be recorded
        for _ in range(2):
            backward(model, windows, mask)
    torch.cuda.current_stream(device).wait_stream(side)
    clear(adapter)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        backward(model, windows, mask)

    def gradients(now: Tensor) -> None:
        windows.copy_(now)
        graph.replay()

    return gradients


def clear(adapter: list[nn.Parameter]) -> None:
    """No gradients: the next backward sets them."""
    for parameter in adapter:
        parameter.grad = None


def backward(model: nn.Module, windows: Tensor, mask: Tensor | None = None) -> None:
    """Add the gradients of the mean loss, PART windows at a time."""
    for part in windows.split(PART):
        with torch.autocast(part.device.type, torch.bfloat16, enabled=part.is_cuda):
            logits = model(input_ids=part, attention_mask=mask, use_cache=False).logits[:, :-1]
        loss = F.cross_entropy(logits.flatten(0, 1).float(), part[:, 1:].flatten())
        (loss * len(part) / BATCH).backward()
