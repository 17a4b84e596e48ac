"""Adapters that belong to one backbone: their mark, the check of it, and loading with the check.

The start adapter carries `loftq_lineage.json` with the sha256 of its backbone; our training writes
it beside the trained adapter too. PEFT's own `save_pretrained` drops files it does not know. For
such a folder the backbone is looked up where adapter_config.json says that the base is.
"""

from __future__ import annotations

import json
import math
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import nn

if TYPE_CHECKING:
    from peft import PeftModel

LINEAGE_FILE = "loftq_lineage.json"
LINEAGE_VERSION = 1
PENDING = ".loftq-refine"
"""Folder inside an output whose start adapter is still to be refined."""


class LineageError(ValueError):
    """An adapter on a backbone that it was not made for."""


def scaling_of(config: Mapping[str, Any], layer: str) -> float:
    """s of one layer: alpha / r, or alpha / sqrt(r) for rsLoRA, its own where a pattern names it.

    Args:
        config: adapter_config.json.
        layer: path of the module in the model.
    """
    from peft.utils.other import get_pattern_key

    found = []
    for name, usual in (("rank_pattern", "r"), ("alpha_pattern", "lora_alpha")):
        pattern = config.get(name) or {}
        found.append(pattern.get(get_pattern_key(pattern.keys(), layer), config[usual]))
    rank, alpha = found
    return float(alpha / (math.sqrt(rank) if config.get("use_rslora") else rank))


def backbone_of(model: nn.Module) -> str | None:
    """sha256 of the model's packed tensors, or None for a dense or partly merged model."""
    config = getattr(getattr(model, "config", None), "quantization_config", None)
    return getattr(config, "backbone", None)


def write_lineage(adapter_dir: str | Path, backbone: str) -> None:
    """Mark the adapter in `adapter_dir` as belonging to `backbone`; PEFT ignores the file."""
    record = {"version": LINEAGE_VERSION, "backbone": backbone}
    path = Path(adapter_dir) / LINEAGE_FILE
    path.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")


def read_lineage(adapter_dir: str | Path) -> str | None:
    """sha256 of the backbone that an adapter belongs to, or None if nothing says it.

    Raises:
        LineageError: the mark exists and cannot be read.
    """
    folder = Path(adapter_dir)
    mark = folder / LINEAGE_FILE
    if mark.exists():
        try:
            record = json.loads(mark.read_text(encoding="utf-8"))
            version, backbone = record["version"], record["backbone"]
        except (ValueError, KeyError, TypeError, OSError) as error:
            raise LineageError(f"{mark}: cannot be read ({error!r}). Restore it.") from error
        if version != LINEAGE_VERSION or not isinstance(backbone, str):
            raise LineageError(f"{mark}: version {version!r}; this loftq reads {LINEAGE_VERSION}.")
        return backbone
    base = _json(folder / "adapter_config.json").get("base_model_name_or_path")
    if not base:
        return None
    found = (_json(Path(base) / "config.json").get("quantization_config") or {}).get("backbone")
    return found if isinstance(found, str) else None


def check_lineage(adapter_dir: str | Path, backbone: str | None) -> None:
    """Refuse an adapter that was made for another backbone.

    Args:
        adapter_dir: folder with adapter_config.json.
        backbone: sha256 of the model's packed tensors (`backbone_of(model)`).

    Raises:
        LineageError: the adapter belongs to another backbone, or `backbone` is None (the model is
            dense or was merged) while the adapter belongs to one.
    """
    wanted = read_lineage(adapter_dir)
    if wanted is None:
        warnings.warn(
            f"{adapter_dir}: nothing says which backbone this adapter belongs to, so it cannot be "
            "checked. Adapters saved by `loftq train` carry the mark.",
            stacklevel=2,
        )
    elif wanted != backbone:
        found = "has no packed backbone" if backbone is None else f"has backbone {backbone[:12]}"
        raise LineageError(
            f"{adapter_dir}: this adapter belongs to backbone {wanted[:12]}, but the model {found}."
            " On another base its correction is noise. Load the model the adapter was made with"
            f"{_hint(adapter_dir)}."
        )


def load_adapter(
    model: nn.Module, adapter_dir: str | Path, *, trainable: bool = False, **options: Any
) -> PeftModel:
    """PEFT model of a packed backbone and an adapter of its lineage.

    Args:
        model: loaded with from_pretrained or made by quantize_model.
        adapter_dir: folder of the adapter, for example OUT/init_adapter.
        trainable: whether the adapter takes gradients.
        **options: of `PeftModel.from_pretrained`.

    Raises:
        LineageError: the adapter belongs to another backbone.
        FileNotFoundError: no adapter there.
    """
    from peft import PeftModel

    folder = Path(adapter_dir)
    if not (folder / "adapter_config.json").is_file():
        raise FileNotFoundError(
            f"{folder}: no adapter_config.json there. Give the folder of an adapter, for example "
            "OUT/init_adapter."
        )
    check_lineage(folder, backbone_of(model))
    if (folder.parent / PENDING).exists():
        warnings.warn(
            f"{folder}: its refinement was interrupted; this is the start that it began with. The "
            "same `loftq quantize` command goes on with it.",
            stacklevel=2,
        )
    return PeftModel.from_pretrained(model, str(folder), is_trainable=trainable, **options)


def _hint(adapter_dir: str | Path) -> str:
    base = _json(Path(adapter_dir) / "adapter_config.json").get("base_model_name_or_path")
    return f", {base}" if base else ""


def _json(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}
