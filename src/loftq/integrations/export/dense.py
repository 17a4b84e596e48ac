"""An ordinary model: every layer is its dequantized Q plus its s B A, never the original weight."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from loftq.checkpoint import DTYPE_NAMES, ShardFile, TensorSpec, open_checkpoint, plan_shards
from loftq.checkpoint.export import Packed
from loftq.checkpoint.layout import MAX_SHARD_BYTES
from loftq.integrations.export.adapter import LoraAdapter
from loftq.integrations.export.job import Job, Tensors, as_json
from loftq.integrations.export.model import PREFIX, same_bytes, side_files
from loftq.integrations.export.source import ExportError
from loftq.integrations.peft import scaling_of

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def merged(weight: Packed, Q: Tensor, lora: LoraAdapter) -> Tensor:
    """Q + s B A in float32, as the layer stores its weight.

    Q is (out_features, in_features), as for PEFT's linear factors. The factors of an embedding are
    the transposes, A (rank, tokens) and B (width, rank); a Conv1D stores its weight transposed.
    """
    pair = lora.pairs.get(weight.module)
    if pair is not None:
        scaling = scaling_of(lora.config, weight.module)
        update = scaling * (lora.read(pair["B"]).float() @ lora.read(pair["A"]).float())
        Q = Q + (update.T if weight.kind == "embedding" else update)
    return Q.T.contiguous() if weight.kind == "conv1d" else Q


def write_dense(job: Job) -> int:
    """Merge layer by layer in float32, round once to `dtype`, and compare what was written.

    Returns:
        Number of tensors that were compared.

    Raises:
        ExportError: the adapter changes a tensor that is not there, or a weight overflows `dtype`.
        ValueError: an adapter that is not plain LoRA, or an unknown dtype.
    """
    source, lora = job.source, job.source.adapter
    lora.plain(patterns=True)
    _check_targets(job)
    dtype = dense_dtype(job)
    shards = _shards(job, dtype)
    total = 2 * (len(source.weights) + len(source.copied))
    by_stem = {weight.stem: weight for weight in source.weights}
    with Tensors(job, shards, total) as out:
        for stem, weight in by_stem.items():
            name = f"{stem}.weight"
            out.add(stem, [name], partial(_merged, job, weight, dtype))
        for name in source.copied:
            out.add(name, [name], partial(_copy, job, name, dtype))
        settings = {**source.config, "dtype": str(dtype).removeprefix("torch.")}
        settings.pop("torch_dtype", None)
        out.finish({**side_files(job, adapter=False), "config.json": as_json(settings)})
    return _check(job, dtype, total)


def dense_dtype(job: Job) -> torch.dtype:
    """The dtype asked for, else the model's own.

    Raises:
        ValueError: not a float dtype that models are stored in.
    """
    name = str(job.options.get("dtype") or job.source.dtype)
    if name not in DTYPES:
        raise ValueError(f"dtype={name!r}: choose one of {', '.join(DTYPES)}.")
    return DTYPES[name]


def _check_targets(job: Job) -> None:
    source, lora = job.source, job.source.adapter
    beside = sorted(set(lora.pairs) - {weight.module for weight in source.weights})
    beside += sorted(set(lora.whole) - set(source.backbone.tensors))
    if beside:
        raise ExportError(
            f"{lora.folder}: the adapter also changes {beside[0]}, which is not a packed layer or "
            "a tensor of the model, so it cannot be merged here. Merge in transformers "
            "(model.merge_and_unload()) or serve the packed model."
        )


def _shards(job: Job, dtype: torch.dtype) -> list[ShardFile]:
    source = job.source
    by_stem = {weight.stem: weight for weight in source.weights}
    specs: list[TensorSpec] = []
    copied = set(source.copied)
    for name, entry in source.backbone.tensors.items():
        stem = name.rpartition(".")[0]
        if name in copied:
            kind = DTYPE_NAMES[dtype] if _is_float(entry.dtype) else entry.dtype
            specs.append(TensorSpec(name, kind, entry.shape))
        elif stem in by_stem:
            weight = by_stem.pop(stem)
            shape = weight.shape[::-1] if weight.kind == "conv1d" else weight.shape
            specs.append(TensorSpec(f"{stem}.weight", DTYPE_NAMES[dtype], shape))
    limit = int(job.options.get("max_shard_bytes") or MAX_SHARD_BYTES)
    return plan_shards(specs, prefix=PREFIX, max_shard_bytes=limit)


def _merged(job: Job, weight: Packed, dtype: torch.dtype) -> dict[str, Tensor]:
    return {f"{weight.stem}.weight": _dense(job, weight, dtype)}


def _copy(job: Job, name: str, dtype: torch.dtype) -> dict[str, Tensor | memoryview]:
    return {name: _copied(job, name, dtype)}


def _dense(job: Job, weight: Packed, dtype: torch.dtype) -> Tensor:
    W = merged(weight, job.source.read(weight).dequantize(), job.source.adapter)
    return _rounded(f"{weight.stem}.weight", W, dtype)


def _copied(job: Job, name: str, dtype: torch.dtype) -> Tensor | memoryview:
    source, lora = job.source, job.source.adapter
    replaced = lora.whole.get(name)
    if replaced is not None:  # a head that was trained with the adapter
        return _rounded(name, lora.read(replaced), dtype)
    entry = source.backbone.tensors[name]
    if not _is_float(entry.dtype) or entry.dtype == DTYPE_NAMES[dtype]:
        return source.backbone.read_bytes(name)
    return _rounded(name, source.backbone.read(name), dtype)


def _rounded(name: str, values: Tensor, dtype: torch.dtype) -> Tensor:
    rounded = values.to(dtype)
    if not torch.isfinite(rounded).all():
        raise ExportError(
            f"{name}: a value of {values.abs().max().item():.3g} is not finite in {dtype}. Choose "
            "dtype=bfloat16 or dtype=float32."
        )
    return rounded


def _is_float(name: str) -> bool:
    return name in ("F32", "F16", "BF16", "F64")


def _check(job: Job, dtype: torch.dtype, total: int) -> int:
    """Every weight again, by rows of B; copied tensors byte for byte."""
    source, written = job.source, open_checkpoint(job.folder)
    done = total // 2
    for weight in source.weights:
        found, wanted = written.read(f"{weight.stem}.weight"), _dense(job, weight, dtype)
        if not torch.equal(found, wanted):
            raise ExportError(
                f"{weight.stem}.weight: what was written differs from the merged weight. The disk "
                "or the memory is at fault: export again."
            )
        done += 1
        job.step(done, total)
    for name in source.copied:
        copied = _copied(job, name, dtype)
        if isinstance(copied, memoryview):
            same_bytes(written, source.backbone, name)
        elif not torch.equal(written.read(name), copied):
            raise ExportError(f"{name}: its copy differs from the source. Export again.")
        done += 1
        job.step(done, total)
    return done - total // 2
