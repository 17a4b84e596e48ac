"""A training step as `loftq train` does it, and what it takes at the peak."""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from loftq.train.graphs import StepGraphs
from loftq.train.keep import keep_blocks
from loftq.train.masks import layers_of
from loftq.train.memory.predict import DTYPES, TrainingSettings
from loftq.train.offload import HostInputs
from loftq.train.prepare import prepare_for_training
from loftq.train.tiles import tiled_loss

LEARNING_RATE = 1e-3


def _adamw_8bit(adapter: list[nn.Parameter]) -> torch.optim.Optimizer:
    from bitsandbytes.optim import AdamW8bit  # of the extra that `loftq train` names, too

    return AdamW8bit(adapter, lr=LEARNING_RATE)


OPTIMIZERS: dict[str, Callable[[list[nn.Parameter]], torch.optim.Optimizer]] = {
    "adamw_torch_fused": lambda adapter: torch.optim.AdamW(adapter, lr=LEARNING_RATE, fused=True),
    "adamw_8bit": _adamw_8bit,
}
"""Those of `loftq train` that are measured here."""


@dataclass
class Trained:
    """What a few steps gave."""

    losses: list[float] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)


def train_steps(
    model: Any,
    settings: TrainingSettings,
    steps: int,
    *,
    device: str,
    fused: bool = True,
    graphs: bool = False,
    offload: bool = False,
    optimizer: str = "adamw_torch_fused",
    keep: int = 0,
    on_step: Callable[[], object] | None = None,
) -> Trained:
    """Optimizer steps on one batch of random tokens, every token trained.

    Args:
        model: a PEFT model.
        settings: batch size, length, dtype, checkpointing, loss.
        steps: how many.
        device: of the model.
        fused: with the training layer (loftq.integrations.training).
        graphs: steps captured, as with graphs=true of `loftq train`.
        offload: inputs of blocks in host memory, as with offload=true.
        optimizer: a key of OPTIMIZERS.
        keep: the last blocks, which are not checkpointed, as with keep_blocks.
        on_step: called after each step.
    """
    prepare_for_training(model, checkpointing=settings.checkpointing, fused=fused)
    base = model.get_base_model()
    if settings.checkpointing and graphs:
        base.gradient_checkpointing_enable({"use_reentrant": False, "preserve_rng_state": False})
    if keep:
        keep_blocks(base, keep)
    chunked = settings.loss == "chunked"
    adapter = [p for p in model.parameters() if p.requires_grad]
    stepped = OPTIMIZERS[optimizer](adapter)
    generator = torch.Generator().manual_seed(0)
    vocabulary = base.config.vocab_size
    shape = (settings.batch_size, settings.length)
    ids = torch.randint(0, vocabulary, shape, generator=generator).to(device)
    found = Trained()
    captured = None
    if graphs:
        captured = StepGraphs(adapter, layers=layers_of(base), accumulates=False)
    host = HostInputs(torch.device(device)) if offload else nullcontext()

    def step(batch: dict[str, Tensor]) -> Tensor:
        with host:
            loss = _loss(model, batch["ids"], settings, chunked, device, tiled=graphs)
        with torch.autograd.set_multithreading_enabled(False):  # as loftq.train.trainers does
            loss.backward()
        return loss.detach()

    for _ in range(steps):
        start = time.perf_counter()
        loss = step({"ids": ids}) if captured is None else captured(step, {"ids": ids})
        nn.utils.clip_grad_norm_(adapter, 1.0)
        stepped.step()
        stepped.zero_grad(set_to_none=True)
        found.losses.append(loss.item())  # waits for the device
        found.seconds.append(time.perf_counter() - start)
        del loss
        if on_step is not None:
            on_step()
    return found


def _loss(
    model: Any,
    ids: Tensor,
    settings: TrainingSettings,
    chunked: bool,
    device: str,
    *,
    tiled: bool,
) -> Tensor:
    dtype = DTYPES[settings.dtype]
    kind = torch.device(device).type
    with torch.autocast(kind, dtype, enabled=dtype != torch.float32):
        if tiled:
            total = tiled_loss(model.get_base_model(), {"input_ids": ids, "labels": ids})
            return total / (ids.numel() - len(ids))
        if chunked:
            out = model(input_ids=ids, labels=ids, fused_lm_head=True, use_cache=False)
            return -out.log_probs.sum() / (ids.numel() - len(ids))
        loss: Tensor = model(input_ids=ids, labels=ids, use_cache=False).loss
        return loss
