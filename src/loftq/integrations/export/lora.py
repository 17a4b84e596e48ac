"""A LoRA for the original model that carries what training changed.

The packed model computes with Q + s B A. It started at Q + s0 B0 A0, which is the original weight W
up to the rounding that the start could not correct. Training therefore moved the weight by

    s B A - s0 B0 A0 = s [B, -(s0/s) B0] [A; A0],

an adapter of rank r + r0 for W itself. With r' = r + r0 and alpha' = s r' its scaling is s again,
whether s was alpha / r or rsLoRA's alpha / sqrt(r): the factors are copied, not multiplied. It is
exact as an update; the model it gives differs from the packed one by W - Q - s0 B0 A0.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor

from loftq.checkpoint import Checkpoint, ShardFile, TensorSpec, open_checkpoint
from loftq.integrations.export.adapter import CONFIG, WEIGHTS, LoraAdapter
from loftq.integrations.export.job import Job, Tensors, as_json
from loftq.integrations.export.source import ExportError


def stacked(lora: LoraAdapter, start: LoraAdapter, module: str) -> tuple[Tensor, Tensor]:
    """A' = [A; A0] (r + r0, in) and B' = [B, -(s0/s) B0] (out, r + r0) of one layer, float32.

    PEFT's factors of an embedding are transposes of these and stack in the same way.
    """
    now, before = lora.pairs[module], start.pairs[module]
    A = torch.cat([lora.read(now["A"]).float(), start.read(before["A"]).float()])
    B0 = start.read(before["B"]).float()
    ratio = start.scaling / lora.scaling
    B = torch.cat([lora.read(now["B"]).float(), B0.mul(-ratio)], 1)
    return A, B


def write_lora(job: Job) -> int:
    """Write the adapter for the original model and compare it with its four factors.

    Returns:
        Number of tensors that were compared.

    Raises:
        ExportError: nothing was trained, or the two adapters do not cover the same layers.
        ValueError: an adapter that is not plain LoRA.
    """
    source = job.source
    lora, start = source.adapter, source.start
    _check_pair(job)
    whole = lora.whole
    total = 2 * (len(lora.pairs) + len(whole))
    with Tensors(job, [_shard(lora, start)], total) as out:
        for module, names in lora.pairs.items():
            out.add(module, list(names.values()), partial(_named, lora, start, module))
        for name in whole.values():
            out.add(name, [name], partial(_bytes, lora, name))
        out.finish({**source.companions, CONFIG: as_json(lora_config(job))})
    return _check(job, open_checkpoint(job.folder, weights=WEIGHTS), total)


def lora_config(job: Job) -> dict[str, Any]:
    """adapter_config.json: rank r + r0, alpha = s (r + r0), the original model as the base."""
    lora, start = job.source.adapter, job.source.start
    rank = lora.rank + start.rank
    alpha = lora.scaling * rank
    return {
        **lora.config_for(original_model(job)),
        "r": rank,
        "lora_alpha": round(alpha) if abs(alpha - round(alpha)) < 1e-9 * alpha else alpha,
        "use_rslora": False,
        "init_lora_weights": True,
    }


def original_model(job: Job) -> str:
    """The model to put the adapter on: `base=`, else what was quantized."""
    return str(job.options.get("base") or job.source.model)


def _check_pair(job: Job) -> None:
    source = job.source
    lora, start = source.adapter, source.start
    if not source.trained:
        raise ExportError(
            f"{source.path}: nothing was trained, so the adapter for the original model is zero. "
            "Give a RUN of `loftq train`, or the trained adapter with adapter=FOLDER."
        )
    lora.plain()
    start.plain()
    only = set(lora.pairs) ^ set(start.pairs)
    if only:
        name = min(only)
        where = "trained" if name in lora.pairs else "start"
        raise ExportError(
            f"{lora.folder}: {name} is in the {where} adapter only, so the difference between the "
            "two is not an adapter of one rank. Train the start adapter itself (loftq.load(OUT, "
            "trainable=True)), not a fresh one."
        )


def _shard(lora: LoraAdapter, start: LoraAdapter) -> ShardFile:
    rank, specs = lora.rank + start.rank, []
    for names in lora.pairs.values():
        columns = lora.tensors.tensors[names["A"]].shape[1]
        rows = lora.tensors.tensors[names["B"]].shape[0]
        specs.append(TensorSpec(names["A"], "F32", (rank, columns)))
        specs.append(TensorSpec(names["B"], "F32", (rows, rank)))
    for name in lora.whole.values():
        entry = lora.tensors.tensors[name]
        specs.append(TensorSpec(name, entry.dtype, entry.shape))
    return ShardFile.plan(WEIGHTS, specs)


def _named(lora: LoraAdapter, start: LoraAdapter, module: str) -> dict[str, Tensor]:
    A, B = stacked(lora, start, module)
    names = lora.pairs[module]
    return {names["A"]: A, names["B"]: B}


def _bytes(lora: LoraAdapter, name: str) -> dict[str, memoryview]:
    return {name: lora.tensors.read_bytes(name)}


def _check(job: Job, written: Checkpoint, total: int) -> int:
    """Each half of each written factor against the factor that it came from."""
    lora, start, done = job.source.adapter, job.source.start, total // 2
    ratio = start.scaling / lora.scaling
    for module, names in lora.pairs.items():
        A, A0 = written.read(names["A"]).split([lora.rank, start.rank])
        B, B0 = written.read(names["B"]).split([lora.rank, start.rank], 1)
        before = start.pairs[module]
        halves = [
            (A, lora.read(names["A"]), 1.0),
            (B, lora.read(names["B"]), 1.0),
            (A0, start.read(before["A"]), 1.0),
            (B0, start.read(before["B"]), -ratio),
        ]
        if not all(torch.equal(found, wanted.float() * by) for found, wanted, by in halves):
            raise ExportError(
                f"{module}: what was written differs from its factors. The disk or the memory is "
                "at fault: export again."
            )
        done += 1
        job.step(done, total)
    for name in lora.whole.values():
        if written.read_bytes(name) != lora.tensors.read_bytes(name):
            raise ExportError(f"{name}: its copy differs from the source. Export again.")
        done += 1
        job.step(done, total)
    return done - total // 2
