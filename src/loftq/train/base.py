"""What a run trains on: a packed backbone, made first if MODEL is full precision, and a start.

A backbone that `train` makes goes to the user's cache under a name that holds the fingerprint of
its plan, so that the next run with the same model and settings finds it again.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from loftq import api
from loftq.integrations.peft import check_lineage
from loftq.integrations.run_folder import START, RunFolder, backbone_and_adapter
from loftq.integrations.source import resolve_source
from loftq.pipeline.run import JOURNAL
from loftq.train.errors import TrainError
from loftq.train.listener import Listener

SHARED = ("seed", "device")
"""Options of a quantization that mean something for the training alone, too."""


@dataclass(frozen=True, kw_only=True)
class Base:
    """A packed model and the adapter that training starts from."""

    folder: Path
    """Output of `quantize`."""
    adapter: Path
    """Its start adapter, or the trained one of an earlier run."""
    backbone: str
    """sha256 of the packed tensors."""
    model: str
    """The model as the user named it."""
    how: str
    """Where it came from, for the user."""

    def record(self) -> dict[str, str]:
        """base.json of the run."""
        return {
            "path": str(self.folder.resolve()),
            "backbone": self.backbone,
            "model": self.model,
            "start": str(self.adapter.resolve()),
        }


def find_base(
    model: str, options: Mapping[str, Any], *, cache: Path | None, listener: Listener
) -> Base:
    """The packed model behind MODEL, quantized now if it is none yet.

    Args:
        model: output of `quantize` (folder or hub id), run of `train`, or full-precision model.
        options: of the quantization (fields of QuantizeConfig, device), only those that were given.
        cache: folder for backbones that are made here; None = `cache_folder()`.
        listener: told of a quantization.

    Raises:
        TrainError: options of a quantization for a model that is packed already.
        ValueError: the model cannot be read or quantized; LineageError, RunError, SourceError, ...
    """
    if (Path(model) / "base.json").is_file():
        _refuse_options(model, options)
        out, adapter = backbone_and_adapter(model)
        origin = f"goes on from the adapter of the run {model}"
        return _base(out, adapter, RunFolder(Path(model)).base().model, origin)
    folder = resolve_source(model)
    if (folder / "loftq.json").is_file():
        _refuse_options(model, options)
        return _base(folder, folder / START, model, "packed already; starts from its init_adapter")
    planned = api.plan(model, **options)
    stem = re.sub(r"[^\w.-]+", "-", Path(model).name or "model")
    out = (cache or cache_folder()) / f"{stem}-{planned.fingerprint[:12]}"
    if (out / "config.json").is_file() and not (out / JOURNAL).exists():
        return _base(out, out / START, model, f"quantized by an earlier run: {out}")
    listener.quantizing(planned, out)
    out.parent.mkdir(parents=True, exist_ok=True)
    api.quantize(model, out, on_batch=listener.quantized, **options)
    listener.quantizing_done()
    return _base(out, out / START, model, f"quantized now, kept in {out}")


def cache_folder() -> Path:
    """Where backbones are kept that `train` made: loftq/packed in the user's cache."""
    root = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(root) / "loftq" / "packed"


def _base(folder: Path, adapter: Path, model: str, how: str) -> Base:
    try:
        backbone = json.loads((folder / "loftq.json").read_text(encoding="utf-8"))["backbone"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise TrainError(
            f"{folder / 'loftq.json'}: cannot be read ({error!r}). Restore the folder, or quantize "
            "again."
        ) from error
    check_lineage(adapter, backbone)
    return Base(folder=folder, adapter=adapter, backbone=backbone, model=model, how=how)


def _refuse_options(model: str, options: Mapping[str, Any]) -> None:
    given = sorted(set(options) - set(SHARED))
    if given:
        raise TrainError(
            f"{model}: packed already, so {', '.join(given)} would change nothing. Leave "
            f"{'it' if len(given) == 1 else 'them'} out, or give the full-precision model."
        )
