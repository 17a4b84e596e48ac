"""What a run trains on: a packed backbone, made first if MODEL is full precision, and a start.

A backbone that `train` makes goes to the user's cache under a name that holds the fingerprint of
its plan, so that the next run with the same model and settings finds it again.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from loftq import api
from loftq.integrations import discover
from loftq.integrations.peft import PENDING, check_lineage
from loftq.integrations.run_folder import START, RunFolder, backbone_and_adapter, tokenizer_home
from loftq.integrations.source import resolve_source
from loftq.pipeline.config import QuantizeConfig
from loftq.pipeline.run import JOURNAL
from loftq.train.errors import TrainError
from loftq.train.listener import Listener
from loftq.train.options import CALIBRATION

if TYPE_CHECKING:
    from loftq.pipeline.plan import Plan

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


@dataclass(frozen=True, kw_only=True)
class Located:
    """A model that was found and may be trained on; nothing was done yet."""

    model: str
    """As the user named it."""
    folder: Path
    """That has its tokenizer: the packed one, or the full-precision one."""
    out: Path
    """The packed one, which may have to be made."""
    adapter: Path
    """That training starts from."""
    how: str
    """Where the base comes from."""
    planned: Plan | None = None
    """How to make `out`, where it is not there yet."""


def own_tokenizer(model: str) -> Path | None:
    """The folder whose tokenizer a run was trained with; None = MODEL is no run."""
    if not (Path(model) / "base.json").is_file():
        return None
    return tokenizer_home(*backbone_and_adapter(model))


def backbone_folder(model: str) -> Path:
    """The folder behind MODEL: of the packed model, or of the full-precision one.

    Raises:
        ValueError: no such model, one that cannot be quantized, or a run whose backbone is gone.
    """
    if (Path(model) / "base.json").is_file():
        return backbone_and_adapter(model)[0]
    folder = resolve_source(model)
    if not (folder / "loftq.json").is_file():
        discover.refuse_unusable(folder)
    return folder


def require_calibration(options: Mapping[str, Any]) -> None:
    """Refuse a quantization that calibrates and was given no text for it.

    Args:
        options: of the quantization, only those that were given; `data` is the calibration text.

    Raises:
        TrainError: the method, the refinement or the allocation needs text.
        ValueError: an option that a quantization refuses.
    """
    known = {field.name for field in fields(QuantizeConfig)}
    config = QuantizeConfig.from_dict({k: v for k, v in options.items() if k in known})
    if config.data is None and (reader := config.text_reader):
        raise TrainError(
            f"{reader}: calibrates on a text of its own, and data is training data here. Give "
            "calibration=TEXT to `train`, or quantize first (loftq quantize MODEL -o OUT --data "
            f"TEXT {reader} ...) and train OUT."
        )


def locate(model: str, options: Mapping[str, Any], *, cache: Path | None) -> Located:
    """Find the model and check that it can be trained on; reads headers only.

    Args:
        model: output of `quantize` (folder or hub id), run of `train`, or full-precision model.
        options: of the quantization (fields of QuantizeConfig, device), only those that were given.
        cache: folder for backbones that are made here; None = `cache_folder()`.

    Raises:
        TrainError: options of a quantization for a model that is packed already.
        ValueError: the model cannot be read or quantized; LineageError, RunError, SourceError, ...
    """
    if (Path(model) / "base.json").is_file():
        _refuse_options(model, options)
        out, adapter = backbone_and_adapter(model)
        name = RunFolder(Path(model)).base().model
        how = f"goes on from the adapter of the run {model}"
        return Located(model=name, folder=out, out=out, adapter=adapter, how=how)
    folder = resolve_source(model)
    if (folder / "loftq.json").is_file():
        _refuse_options(model, options)
        how, start = "packed already; starts from its init_adapter", folder / START
        return Located(model=model, folder=folder, out=folder, adapter=start, how=how)
    planned = api.plan(model, **options)
    stem = re.sub(r"[^\w.-]+", "-", Path(model).name or "model")
    out = (cache or cache_folder()) / f"{stem}-{planned.fingerprint[:12]}"
    made = is_made(out)
    return Located(
        model=model,
        folder=folder,
        out=out,
        adapter=out / START,
        how=f"quantized by an earlier run: {out}" if made else f"quantized now, kept in {out}",
        planned=None if made else planned,
    )


def settle(found: Located, options: Mapping[str, Any], listener: Listener) -> Base:
    """The base of a run, quantized now if it is not packed yet.

    Args:
        found: from `locate`.
        options: the same.
        listener: told of a quantization.

    Raises:
        LineageError: the adapter belongs to another backbone.
        ValueError: a weight that cannot be quantized.
    """
    if found.planned is not None and not is_made(found.out):  # nor by another process meanwhile
        listener.quantizing(found.planned, found.out)
        found.out.parent.mkdir(parents=True, exist_ok=True)
        api.quantize(
            found.model,
            found.out,
            on_batch=listener.quantized,
            on_block=listener.calibrated,
            on_refine=listener.refined,
            **options,
        )
        listener.quantizing_done()
    file = found.out / "loftq.json"
    try:
        backbone = json.loads(file.read_text(encoding="utf-8"))["backbone"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise TrainError(
            f"{file}: cannot be read ({error!r}). Restore the folder, or quantize again."
        ) from error
    check_lineage(found.adapter, backbone)
    return Base(
        folder=found.out,
        adapter=found.adapter,
        backbone=backbone,
        model=found.model,
        how=found.how,
    )


def is_made(out: Path) -> bool:
    """Whether `out` holds a finished quantization, refined if it is to be."""
    begun = (out / JOURNAL).exists() or (out / PENDING).exists()
    return (out / "config.json").is_file() and not begun


def cache_folder() -> Path:
    """Where backbones are kept that `train` made: loftq/packed in the user's cache."""
    root = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(root) / "loftq" / "packed"


def _refuse_options(model: str, options: Mapping[str, Any]) -> None:
    renamed = {"data": CALIBRATION}
    given = sorted(renamed.get(name, name) for name in set(options) - set(SHARED))
    if given:
        raise TrainError(
            f"{model}: packed already, so {', '.join(given)} would change nothing. Leave "
            f"{'it' if len(given) == 1 else 'them'} out, or give the full-precision model."
        )
