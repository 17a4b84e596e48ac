"""A causal language model ready to run, from whatever folder a user has.

That is an output of `quantize` with its start adapter, a run of `train` with its trained one, or
a plain model. Other adapters are taken by folder and checked against the backbone.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from loftq.integrations import discover
from loftq.integrations.device import check_bfloat16, check_device, default_device
from loftq.integrations.members import average_, load_members_, member_folders
from loftq.integrations.peft import load_adapter
from loftq.integrations.run_folder import START, backbone_and_adapter, open_run, tokenizer_home
from loftq.integrations.source import quantization_method, read_config

DTYPES = ("auto", "float32", "float16", "bfloat16")
NO_ADAPTER = "none"
CONFIG = "adapter_config.json"


@dataclass(frozen=True, kw_only=True)
class CausalModel:
    """A model that continues text, and where it came from."""

    model: nn.Module
    """On its device; in PEFT if it has an adapter."""
    tokenizer: Any
    folder: Path
    """Of the backbone, or of the plain model."""
    adapter: Path | None
    """Folder of the adapter; of an ensemble, the first member's."""
    dtype: torch.dtype
    """Of the computation."""
    packed: bool
    """Whether the weights came packed."""

    @property
    def device(self) -> torch.device:
        """Where it is."""
        return next(self.model.parameters()).device

    @property
    def context(self) -> int | None:
        """Tokens that the model was made for, prompt and answer together; None = not stated."""
        config: Any = self.model.config
        found = getattr(config.get_text_config(), "max_position_embeddings", None)
        return found if isinstance(found, int) and found > 0 else None


def open_causal(
    path: str | Path,
    *,
    adapter: str | Path | None = None,
    device: str | None = None,
    dtype: str = "auto",
    allow_bare: bool = False,
) -> CausalModel:
    """Load the model of a run, an output or a plain folder, with its tokenizer and adapter.

    Args:
        path: run of `train`, output of `quantize` or its hub id, a plain model, or folder of an
            ensemble: probabilities of the next token are then the mean of its members'.
        adapter: None = the one that belongs to `path`; "none" = the backbone alone; or a folder: an
            adapter, a run, or a folder inside the output such as init_adapter.
        device: None = the GPU if there is one.
        dtype: one of DTYPES; auto = as stored.
        allow_bare: whether a backbone that needs its adapter may be opened without; it then warns.

    Raises:
        ValueError: no such folder, not a causal language model, no tokenizer, an adapter of another
            backbone, or none for a backbone that needs one.
    """
    where = device or default_device()
    check_device(where)
    runs = member_folders(Path(path).expanduser()) or ()
    if runs and adapter is not None:
        raise ValueError(f"{path}: an ensemble brings its adapters; leave adapter={adapter} out.")
    folder, own = _folders(runs[0] if runs else path)
    config = read_config(folder)
    packed = quantization_method(config) == "loftq"
    chosen = _adapter(folder, own, adapter)
    if chosen is None and not allow_bare:
        _refuse_bare(path, config)
    tokenizer = discover.load_tokenizer(tokenizer_home(folder, chosen))
    base = discover.model_class(folder).from_pretrained(folder, dtype=dtype)
    _check_causal(folder, base)
    model: nn.Module = base
    if runs:
        load_members_(base, [open_run(run).adapter for run in runs])
        average_(base, len(runs))
    elif chosen is not None:
        model = load_adapter(base, chosen)
    check_bfloat16(base.dtype, torch.device(where))
    return CausalModel(
        model=model.to(where).eval(),
        tokenizer=tokenizer,
        folder=folder,
        adapter=chosen,
        dtype=base.dtype,
        packed=packed,
    )


def _folders(path: str | Path) -> tuple[Path, Path | None]:
    """(backbone or plain model, the adapter that comes with it)."""
    here = Path(path).expanduser()
    if (here / "base.json").is_file():
        return backbone_and_adapter(here)
    folder = discover.resolve_source(path)
    own = folder / START
    return folder, own if (own / CONFIG).is_file() else None


def _adapter(folder: Path, own: Path | None, asked: str | Path | None) -> Path | None:
    if asked is None:
        return own
    if str(asked) == NO_ADAPTER:
        return None
    found = Path(asked).expanduser()
    if (found / "base.json").is_file():
        return open_run(found).adapter
    inside = folder / found
    return inside if not found.is_dir() and (inside / CONFIG).is_file() else found


def _refuse_bare(path: str | Path, config: dict[str, Any]) -> None:
    if not (config.get("quantization_config") or {}).get("adapter_required"):
        return
    raise ValueError(
        f"{path}: this backbone was chosen together with its start adapter and is worse than plain "
        f"rounding without it. Leave adapter=none out; adapter={START} is the start before any "
        "training. To talk to a plainly rounded model, quantize with --method qlora."
    )


def _check_causal(folder: Path, model: nn.Module) -> None:
    kind = type(model).__name__
    if discover.task_type(kind) != "CAUSAL_LM":
        raise ValueError(
            f"{folder}: {kind} is not a causal language model, so it does not continue text. Give "
            "a model for text generation."
        )
