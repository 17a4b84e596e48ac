"""The checks of `loftq inspect`: each yields its problems, naming tensor or file and the remedy."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from loftq.checkpoint import Checkpoint, backbone_hash
from loftq.formats import QuantizedTensor, decode_scales
from loftq.integrations.peft import LineageError, read_lineage
from loftq.methods.base import relative_error
from loftq.ops.reference import PER_TENSOR, view_bytes
from loftq.pipeline.plan import adapter_names
from loftq.pipeline.stream import oriented
from loftq.report.output import (
    ADAPTER,
    AGAIN,
    InspectError,
    OutputFiles,
    RecordedLayer,
    read_object,
)

HASHED_AT_ONCE = 1 << 26
Step = Callable[[], object]
"""Called after each tensor or layer."""


def check_headers(files: OutputFiles) -> Iterator[str]:
    """Names, shapes and dtypes in the files against loftq.json and config.json."""
    yield from _listed_layers(files)
    yield from _present(files)
    for layer in files.layers:
        wanted = {name: ("U8", shape) for name, shape in layer.packed().items()}
        wanted |= {name: ("F32", shape) for name, shape in layer.factors().items()}
        for name, (dtype, shape) in wanted.items():
            home = files.home(name)
            if home is None:
                continue  # said by _present
            entry = home.tensors[name]
            if (entry.dtype, entry.shape) != (dtype, shape):
                yield (
                    f"{files.where(name)}: {entry.dtype} {entry.shape}, expected {dtype} {shape} "
                    f"for {layer.spec}. {AGAIN}"
                )


def _listed_layers(files: OutputFiles) -> Iterator[str]:
    listed = files.config.get("layers") or {}
    recorded = {
        layer.info.module: {"format": str(layer.spec), "shape": list(layer.info.shape)}
        for layer in files.layers
    }
    for module in sorted(listed.keys() | recorded.keys()):
        if listed.get(module) != recorded.get(module):
            yield (
                f"{files.folder / 'config.json'}: {module} is {listed.get(module)}, loftq.json has "
                f"{recorded.get(module)}. {AGAIN}"
            )


def _present(files: OutputFiles) -> Iterator[str]:
    stored = files.backbone.tensors.keys() | files.adapter.tensors.keys()
    needed = {name for layer in files.layers for name in [*layer.packed(), *layer.factors()]}
    for name in sorted((needed | files.record["tensors"].keys()) - stored):
        yield f"{files.folder}: tensor {name} is in no file. {AGAIN}"
    for name in sorted((needed | stored) - files.record["tensors"].keys()):
        yield f"{files.where(name)}: its hash is not in loftq.json. {AGAIN}"


def check_hashes(files: OutputFiles, step: Step) -> Iterator[str]:
    """sha256 of every tensor, and of the backbone as a whole."""
    found = {}
    for name, recorded in files.record["tensors"].items():
        home = files.home(name)
        assert home is not None, name  # check_headers comes first
        found[name] = _sha256(home.read_bytes(name))
        if found[name] != recorded:
            yield (
                f"{files.where(name)}: sha256 {found[name][:12]}..., recorded {recorded[:12]}...: "
                f"the data changed since it was written. {AGAIN}"
            )
        step()
    packed = {name: found[name] for layer in files.layers for name in layer.packed()}
    hashes = {
        "of the packed tensors": backbone_hash(packed),
        "in loftq.json": files.record["backbone"],
        "in config.json": files.config.get("backbone"),
    }
    if len(set(hashes.values())) > 1:
        text = ", ".join(f"{str(digest)[:12]} {place}" for place, digest in hashes.items())
        yield f"{files.folder}: the backbone hash is {text}. {AGAIN}"


def _sha256(data: memoryview) -> str:
    digest = hashlib.sha256()
    for start in range(0, len(data), HASHED_AT_ONCE):
        digest.update(data[start : start + HASHED_AT_ONCE])
    return digest.hexdigest()


def check_sizes(files: OutputFiles, sizes: dict[str, int]) -> Iterator[str]:
    """Packed bytes of each layer and the totals, to the byte.

    Args:
        files: the output.
        sizes: packed, unquantized and adapter bytes found in the files.
    """
    for layer in files.layers:
        stored = sum(files.backbone.tensors[name].nbytes for name in layer.packed())
        by_format = layer.spec.bits_per_weight(*layer.info.shape) * layer.weights / 8
        recorded = layer.record["bits_per_weight"] * layer.weights / 8
        if not stored == round(by_format) == round(recorded):
            yield (
                f"{layer.info.module}: {stored} bytes packed; {layer.spec} takes "
                f"{round(by_format)}, the record says {round(recorded)}. {AGAIN}"
            )
    totals = files.record["totals"]
    for kind in ("packed", "unquantized", "adapter"):
        recorded = totals.get(f"{kind}_bytes")
        if recorded != sizes[kind]:
            yield (
                f"{files.folder / 'loftq.json'}: {kind}_bytes is {recorded}, the files hold "
                f"{sizes[kind]}. {AGAIN}"
            )


def check_scales(files: OutputFiles) -> Iterator[str]:
    """Every decoded scale, nested constant and offset is finite."""
    for layer in files.layers:
        stored = _packed(layer, files)
        nested = stored.get("weight_nested")
        coding = layer.spec.scale_coding
        numbers = {"weight_scale": decode_scales(stored["weight_scale"], nested, coding)}
        if nested is not None:
            numbers["weight_nested"] = view_bytes(nested, torch.float32)
        if layer.spec.group_size == PER_TENSOR:
            numbers["weight_zero"] = view_bytes(stored["weight_zero"], torch.float32)
        for part, values in numbers.items():
            bad = int((~torch.isfinite(values)).sum())
            if bad:
                name = f"{layer.info.tensor.removesuffix('.weight')}.{part}"
                yield f"{files.where(name)}: {bad} numbers are not finite. {AGAIN}"


def check_adapter(files: OutputFiles) -> Iterator[str]:
    """The start adapter belongs to this backbone, has the recorded rank and alpha, is finite."""
    folder = files.folder / ADAPTER
    try:
        lineage = read_lineage(folder)
        if lineage != files.record["backbone"]:
            yield (
                f"{folder}: the adapter belongs to backbone {str(lineage)[:12]}, this one is "
                f"{files.record['backbone'][:12]}. {AGAIN}"
            )
        yield from _adapter_config(files)
    except (LineageError, InspectError) as error:
        yield str(error)
    for name in files.adapter.tensors:
        bad = int((~torch.isfinite(files.adapter.read(name))).sum())
        if bad:
            yield f"{files.where(name)}: {bad} numbers are not finite. {AGAIN}"


def _adapter_config(files: OutputFiles) -> Iterator[str]:
    path = files.folder / ADAPTER / "adapter_config.json"
    found, config = read_object(path), files.record["config"]
    root = 0.5 if config.get("rslora") else 1.0
    others = [x for x in files.record["layers"] if x["rank"] not in (0, config.get("rank"))]
    wanted: dict[str, Any] = {
        "r": config.get("rank"),
        "lora_alpha": config.get("alpha") or config.get("rank"),
        "use_rslora": config.get("rslora", False),
        "rank_pattern": {x["name"]: x["rank"] for x in others},
        "alpha_pattern": {x["name"]: x["scaling"] * x["rank"] ** root for x in others},
    }
    for key, value in wanted.items():
        if (found.get(key) or None) != (value or None):  # absent and empty mean the same
            yield f"{path}: {key}={found.get(key)!r}, quantized with {value!r}. {AGAIN}"


def effective_error(layer: RecordedLayer, files: OutputFiles, origin: Checkpoint) -> float:
    """||W - Q - scaling B A||_F / ||W||_F of one layer, everything as it is stored."""
    W, Q, B, A = stored_parts(layer, files, origin)
    return relative_error(W, Q, B, A, layer.record["scaling"])


def stored_parts(
    layer: RecordedLayer, files: OutputFiles, origin: Checkpoint
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """W and Q (out_features, in_features), B (out_features, rank), A (rank, in_features); float32.

    W is read from the source; Q, B and A are what the output holds.
    """
    W = oriented(origin.read(layer.info.tensor), layer.info).to(torch.float32)
    Q = QuantizedTensor.from_state_dict(layer.spec, layer.info.shape, _packed(layer, files))
    A, B = _factors(layer, files)
    return W, Q.dequantize(), B, A


def _packed(layer: RecordedLayer, files: OutputFiles) -> dict[str, Tensor]:
    return {name.rpartition(".")[2]: files.backbone.read(name) for name in layer.packed()}


def _factors(layer: RecordedLayer, files: OutputFiles) -> tuple[Tensor, Tensor]:
    """A (rank, in_features) and B (out_features, rank), whatever PEFT's orientation."""
    if not layer.record["rank"]:
        out_features, in_features = layer.info.shape
        return torch.zeros(0, in_features), torch.zeros(out_features, 0)
    name_a, name_b = adapter_names(layer.info)
    A, B = files.adapter.read(name_a), files.adapter.read(name_b)
    return (B.mT.contiguous(), A.mT.contiguous()) if layer.info.kind == "embedding" else (A, B)
