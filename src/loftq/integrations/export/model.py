"""A model folder in another layout: config.json, safetensors, tokenizer, and the adapter."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

import torch

from loftq.checkpoint import Checkpoint, ShardFile, TensorSpec, open_checkpoint, plan_shards
from loftq.checkpoint.export import Layout, Packed
from loftq.checkpoint.layout import MAX_SHARD_BYTES
from loftq.integrations.export.adapter import CONFIG, WEIGHTS
from loftq.integrations.export.job import ADAPTER, Job, Tensors, as_json
from loftq.integrations.export.source import ExportError, ExportSource
from loftq.integrations.peft import LINEAGE_FILE

PREFIX = "model"


def write_model(job: Job, layout: Layout, config: Mapping[str, Any]) -> int:
    """Lay the backbone out anew, copy everything else, and compare what was written.

    Args:
        job: source and folder.
        layout: that holds every weight.
        config: changes to config.json besides its quantization_config.

    Returns:
        Number of weights and copied tensors that were compared with the source.

    Raises:
        ExportError: a written tensor does not stand for the source's weight.
    """
    source, shards = job.source, _shards(job, layout)
    total = 2 * (len(source.weights) + len(source.copied) + len(source.adapter.tensors.tensors))
    with Tensors(job, shards, total) as out:
        for weight in source.weights:
            names = [spec.name for spec in layout.tensors(weight)]
            out.add(weight.stem, names, partial(_packed, layout, source, weight))
        copy_tensors(out, source.backbone, source.copied)
        copy_tensors(out, source.adapter.tensors, list(source.adapter.tensors.tensors))
        settings = {
            **source.config,
            **config,
            "quantization_config": layout.config(source.weights, source.kept),
        }
        out.finish({**side_files(job), "config.json": as_json(settings)})
    return check_model(job, layout, total)


def _shards(job: Job, layout: Layout) -> list[ShardFile]:
    source = job.source
    held = {weight.stem: layout.tensors(weight) for weight in source.weights}
    specs: list[TensorSpec] = []
    for name, entry in source.backbone.tensors.items():  # in the order of the source
        stem = name.rpartition(".")[0]
        if name in source.copied:
            specs.append(TensorSpec(name, entry.dtype, entry.shape))
        else:
            specs += held.pop(stem, [])
    limit = int(job.options.get("max_shard_bytes") or MAX_SHARD_BYTES)
    return [*plan_shards(specs, prefix=PREFIX, max_shard_bytes=limit), adapter_shard(job)]


def _packed(layout: Layout, source: ExportSource, weight: Packed) -> dict[str, torch.Tensor]:
    return layout.pack(weight, source.read(weight))


def _bytes(source: Checkpoint, name: str) -> dict[str, memoryview]:
    return {name: source.read_bytes(name)}


def adapter_shard(job: Job) -> ShardFile:
    """The adapter's file, tensor for tensor."""
    entries = job.source.adapter.tensors.tensors.values()
    specs = [TensorSpec(entry.name, entry.dtype, entry.shape) for entry in entries]
    return ShardFile.plan(f"{ADAPTER}/{WEIGHTS}", specs)


def copy_tensors(out: Tensors, source: Checkpoint, names: list[str]) -> None:
    """Copy tensors byte for byte."""
    for name in names:
        out.add(name, [name], partial(_bytes, source, name))


def side_files(job: Job, *, adapter: bool = True) -> dict[str, bytes]:
    """Tokenizer, generation config, and the adapter's own files."""
    files = job.source.companions
    if adapter:
        base, lora = str(job.output), job.source.adapter
        files[f"{ADAPTER}/{CONFIG}"] = as_json(lora.config_for(base))
        lineage = {"version": 1, "backbone": job.source.record["backbone"]}
        files[f"{ADAPTER}/{LINEAGE_FILE}"] = as_json(lineage)
    return files


def check_model(job: Job, layout: Layout, total: int) -> int:
    """Read the folder again and compare every tensor with the source, bit by bit."""
    source = job.source
    written = open_checkpoint(job.folder)
    done = total // 2
    for weight in source.weights:
        tensors = {spec.name: written.read(spec.name) for spec in layout.tensors(weight)}
        _equal(weight, _unpacked(layout, weight, tensors), source.read(weight).dequantize())
        done += 1
        job.step(done, total)
    copies = [(written, source.backbone, source.copied)]
    adapter = open_checkpoint(job.folder / ADAPTER, weights=WEIGHTS)
    copies.append((adapter, source.adapter.tensors, list(source.adapter.tensors.tensors)))
    for found, original, names in copies:
        for name in names:
            same_bytes(found, original, name)
            done += 1
            job.step(done, total)
    return done - total // 2


def _unpacked(layout: Layout, weight: Packed, tensors: Mapping[str, torch.Tensor]) -> torch.Tensor:
    try:
        return layout.unpack(weight, tensors)
    except ValueError as error:  # the description of a weight is no longer one
        raise ExportError(
            f"{weight.module}: what was written cannot be read back ({error}). The disk or the "
            "memory is at fault: export again."
        ) from error


def _equal(weight: Packed, found: torch.Tensor, wanted: torch.Tensor) -> None:
    if not torch.equal(found, wanted):
        off = int((found != wanted).sum()) if found.shape == wanted.shape else "all"
        raise ExportError(
            f"{weight.module}: {off} of {wanted.numel()} weights read back differ from the source. "
            "The disk or the memory is at fault, or loftq: export again, and report it if it "
            "happens twice."
        )


def same_bytes(found: Checkpoint, original: Checkpoint, name: str) -> None:
    """Refuse a copy that differs from its original.

    Raises:
        ExportError: naming the tensor.
    """
    if found.read_bytes(name) != original.read_bytes(name):
        raise ExportError(
            f"{name}: its copy differs from the source. The disk or the memory is at fault: export "
            "again."
        )
