"""What is exported: the packed backbone of an OUT with one adapter of its lineage."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from loftq.checkpoint import Checkpoint, open_checkpoint
from loftq.checkpoint.export import Packed
from loftq.formats import COMPONENTS, QuantizedTensor, parse_format
from loftq.integrations.artifact import WEIGHTS_INDEX, companions
from loftq.integrations.export.adapter import LoraAdapter
from loftq.integrations.peft import check_lineage
from loftq.integrations.run_folder import tokenizer_home
from loftq.integrations.source import resolve_source
from loftq.pipeline.run import JOURNAL

START = "init_adapter"
TOKENIZER = (
    "tokenizer*", "chat_template*", "special_tokens_map.json", "added_tokens.json", "vocab.*",
    "merges.txt", "*.model", "*.tiktoken",
)  # fmt: skip
"""Names under which tokenizers save themselves."""


class ExportError(ValueError):
    """Nothing can be exported from here, or not in this form; the message says what can."""


@dataclass(frozen=True, kw_only=True)
class ExportSource:
    """A backbone and the adapter that goes with it; opening it reads headers and JSON only."""

    path: Path
    """As the user gave it: an OUT of quantize or a RUN of train."""
    folder: Path
    """The OUT that holds the backbone."""
    adapter: LoraAdapter
    start: LoraAdapter
    """The adapter that the backbone was made with; `adapter` itself if nothing was trained."""
    record: Mapping[str, Any]
    """loftq.json."""
    config: Mapping[str, Any]
    """config.json without its quantization_config."""
    quantization: Mapping[str, Any]
    """quantization_config."""
    weights: tuple[Packed, ...]
    backbone: Checkpoint

    @property
    def architecture(self) -> str:
        """Class of the model, as config.json names it."""
        return next(iter(self.config.get("architectures") or ["?"]))

    @property
    def model(self) -> str:
        """The original model, as the user named it to quantize."""
        return str(self.record["source"]["name"])

    @property
    def dtype(self) -> str:
        """The dtype that transformers loads the model in: config.json's, else float32."""
        return str(self.config.get("dtype") or self.config.get("torch_dtype") or "float32")

    @property
    def trained(self) -> bool:
        """Whether the adapter is another than the start."""
        return self.adapter.folder.resolve() != self.start.folder.resolve()

    @property
    def kept(self) -> list[str]:
        """Linear-like modules that stayed dense."""
        return list(self.quantization.get("modules_to_not_convert") or [])

    @property
    def copied(self) -> list[str]:
        """Tensors of the backbone that are not packed."""
        packed = {f"{weight.stem}.{part}" for weight in self.weights for part in COMPONENTS}
        return [name for name in self.backbone.tensors if name not in packed]

    @property
    def tokenizer(self) -> Path:
        """Folder whose tokenizer the model was trained with: the adapter's, if it has one.

        Training may have given a base model the chat template that it now answers by.
        """
        return tokenizer_home(self.folder, self.adapter.folder)

    @property
    def companions(self) -> dict[str, bytes]:
        """Name -> content of the tokenizer and generation files that go with every export."""
        found = companions(self.folder)
        if self.tokenizer != self.folder:
            found += [path for name in TOKENIZER for path in sorted(self.tokenizer.glob(name))]
        return {path.name: path.read_bytes() for path in found}

    def read(self, weight: Packed) -> QuantizedTensor:
        """One packed weight, mapped from its file."""
        prefix = f"{weight.stem}."
        parts = {
            name: self.backbone.read(prefix + name)
            for name in COMPONENTS
            if prefix + name in self.backbone.tensors
        }
        return QuantizedTensor.from_state_dict(weight.spec, weight.shape, parts)

    def fingerprint(self) -> str:
        """Identity of backbone and adapter: what an export made from them depends on."""
        digest = hashlib.sha256(str(self.record["backbone"]).encode())
        digest.update(self.adapter.sha256().encode())
        return digest.hexdigest()


def open_source(path: str | Path, *, adapter: str | Path | None = None) -> ExportSource:
    """Open an OUT of quantize or a RUN of train.

    Args:
        path: the folder; an OUT may also be a hub id.
        adapter: another adapter of the same backbone than the RUN's or the start, for example one
            trained with TRL.

    Raises:
        ExportError: neither an OUT nor a RUN, an unfinished one, or unreadable records.
        LineageError: the adapter belongs to another backbone.
    """
    given = resolve_source(path)
    folder, chosen = given, given / START
    if (given / "base.json").is_file():
        from loftq.integrations.run_folder import backbone_and_adapter

        folder, chosen = backbone_and_adapter(given)
    record, config = _records(folder)
    if adapter is not None:
        chosen = Path(adapter)
    check_lineage(chosen, record["backbone"])
    quantization = config.pop("quantization_config")
    opened = LoraAdapter.open(chosen)
    return ExportSource(
        path=given,
        folder=folder,
        adapter=opened,
        start=LoraAdapter.open(folder / START),
        record=record,
        config=config,
        quantization=quantization,
        weights=_weights(folder, record),
        backbone=open_checkpoint(folder, weights=quantization.get("weights") or WEIGHTS_INDEX),
    )


def _records(folder: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    if (folder / JOURNAL).exists():
        raise ExportError(
            f"{folder}: an unfinished run. Give its `loftq quantize` command again: it resumes."
        )
    if not (folder / "loftq.json").is_file():
        raise ExportError(
            f"{folder}: neither an output of `loftq quantize` (no loftq.json) nor a run of `loftq "
            "train` (no base.json). Give one of these folders."
        )
    record, config = read_json(folder / "loftq.json"), read_json(folder / "config.json")
    quantization = config.get("quantization_config")
    if not isinstance(quantization, dict) or quantization.get("quant_method") != "loftq":
        raise ExportError(
            f"{folder / 'config.json'}: no quantization_config of loftq. Restore the folder from "
            "where it came, or quantize again."
        )
    if record.get("version") != 1 or quantization.get("version") != 1:
        raise ExportError(
            f"{folder}: written by a newer loftq (version {record.get('version')}, this one reads "
            "1). Upgrade loftq."
        )
    return record, config


def _weights(folder: Path, record: Mapping[str, Any]) -> tuple[Packed, ...]:
    try:
        return tuple(
            Packed(
                module=entry["name"],
                stem=str(entry["tensor"]).removesuffix(".weight"),
                spec=parse_format(entry["format"]),
                shape=(int(entry["shape"][0]), int(entry["shape"][1])),
                kind=entry["kind"],
            )
            for entry in record["layers"]
        )
    except (KeyError, TypeError, IndexError) as error:
        raise ExportError(
            f"{folder / 'loftq.json'}: a layer's record is damaged ({error!r}). Restore the folder "
            "from where it came, or quantize again."
        ) from error


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in a file.

    Raises:
        ExportError: missing, or something else in it.
    """
    try:
        value = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise ExportError(f"{path}: cannot be read ({error}).") from error
    if not isinstance(value, dict):
        raise ExportError(f"{path}: not a JSON object.")
    return value
