"""The files of an output folder, opened side by side: record, configs, backbone, adapter."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

from loftq.checkpoint import Checkpoint, open_checkpoint
from loftq.formats import FormatSpec, component_shapes, parse_format
from loftq.integrations.artifact import WEIGHTS_INDEX
from loftq.pipeline.layout import LayerInfo
from loftq.pipeline.plan import adapter_names
from loftq.pipeline.run import JOURNAL

ADAPTER = "init_adapter"
ADAPTER_WEIGHTS = "adapter_model.safetensors"
RECORD_VERSION = 1
RECORD_KEYS = {"layers", "tensors", "totals", "backbone", "config", "scaling", "source"}
AGAIN = "Restore the folder from where it came, or quantize again."


class InspectError(ValueError):
    """The folder is not an output of `loftq quantize`, so there is nothing to inspect."""


@dataclass(frozen=True)
class RecordedLayer:
    """One packed layer, as its record describes it."""

    info: LayerInfo
    spec: FormatSpec
    record: Mapping[str, Any]

    @classmethod
    def of(cls, record: Mapping[str, Any]) -> RecordedLayer:
        """From an entry of `layers` in loftq.json."""
        out_features, in_features = record["shape"]
        info = LayerInfo(
            module=record["name"],
            tensor=record["tensor"],
            shape=(int(out_features), int(in_features)),
            kind=record["kind"],
        )
        for key in ("rank", "scaling", "plain_error", "error", "bits_per_weight"):
            record[key] + 0  # a number, or a TypeError or KeyError here
        return cls(info, parse_format(record["format"]), record)

    @property
    def weights(self) -> int:
        """Number of weights."""
        return prod(self.info.shape)

    def packed(self) -> dict[str, tuple[int, ...]]:
        """Stored name -> shape of each packed tensor."""
        stem = self.info.tensor.removesuffix(".weight")
        shapes = component_shapes(self.spec, self.info.shape)
        return {f"{stem}.{part}": shape for part, shape in shapes.items()}

    def factors(self) -> dict[str, tuple[int, ...]]:
        """Stored name -> shape of A and B."""
        name_a, name_b = adapter_names(self.info)
        (out_features, in_features), rank = self.info.shape, self.record["rank"]
        if not rank:
            return {}
        if self.info.kind == "embedding":
            return {name_a: (rank, out_features), name_b: (in_features, rank)}
        return {name_a: (rank, in_features), name_b: (out_features, rank)}


@dataclass(frozen=True)
class OutputFiles:
    """An output of `loftq quantize`; opening it reads headers and JSON only."""

    folder: Path
    record: Mapping[str, Any]
    """loftq.json."""
    config: Mapping[str, Any]
    """quantization_config of config.json."""
    layers: tuple[RecordedLayer, ...]
    backbone: Checkpoint
    adapter: Checkpoint

    @classmethod
    def open(cls, folder: Path) -> OutputFiles:
        """Open the folder.

        Raises:
            InspectError: no output of `loftq quantize`, an unfinished one, or unreadable records.
            CheckpointError, OSError: damaged weight files.
        """
        record, config = _records(folder)
        layers = _layers(folder, record)
        backbone = open_checkpoint(folder, weights=config.get("weights") or WEIGHTS_INDEX)
        adapter = open_checkpoint(folder / ADAPTER, weights=ADAPTER_WEIGHTS)
        return cls(folder, record, config, layers, backbone, adapter)

    def home(self, tensor: str) -> Checkpoint | None:
        """The checkpoint that holds a tensor."""
        return next((c for c in (self.backbone, self.adapter) if tensor in c.tensors), None)

    def where(self, tensor: str) -> str:
        """The tensor with its file, for messages."""
        home = self.home(tensor)
        if home is None:
            return tensor
        return f"{home.folder / home.tensors[tensor].file}: {tensor}"


def read_object(path: Path) -> dict[str, Any]:
    """The JSON object in a file.

    Raises:
        InspectError: missing, or something else in it.
    """
    try:
        value = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise InspectError(f"{path}: cannot be read ({error}). {AGAIN}") from error
    if not isinstance(value, dict):
        raise InspectError(f"{path}: not a JSON object. {AGAIN}")
    return value


def _records(folder: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    if not folder.is_dir():
        raise InspectError(f"{folder}: no such folder. Give an output folder of `loftq quantize`.")
    if (folder / JOURNAL).exists():
        raise InspectError(
            f"{folder}: an unfinished run. Give its `loftq quantize` command again: it resumes."
        )
    if not (folder / "loftq.json").is_file():
        raise InspectError(
            f"{folder}: no loftq.json, so not an output of `loftq quantize` (a model that was "
            "saved again has none). Give the folder that quantize wrote."
        )
    record = read_object(folder / "loftq.json")
    config = read_object(folder / "config.json").get("quantization_config")
    if not isinstance(config, dict) or config.get("quant_method") != "loftq":
        raise InspectError(f"{folder / 'config.json'}: no quantization_config of loftq. {AGAIN}")
    if record.get("version") != RECORD_VERSION:
        raise InspectError(
            f"{folder / 'loftq.json'}: version {record.get('version')!r}, this loftq reads "
            f"{RECORD_VERSION}. Upgrade loftq."
        )
    missing = RECORD_KEYS - set(record)
    if missing:
        raise InspectError(
            f"{folder / 'loftq.json'}: without {', '.join(sorted(missing))}. {AGAIN}"
        )
    return record, config


def _layers(folder: Path, record: Mapping[str, Any]) -> tuple[RecordedLayer, ...]:
    try:
        return tuple(RecordedLayer.of(entry) for entry in record["layers"])
    except (KeyError, TypeError, ValueError) as error:
        raise InspectError(
            f"{folder / 'loftq.json'}: a layer's record is damaged ({error!r}). {AGAIN}"
        ) from error
