"""What it costs to move an adapter from the packed model to the original one.

`export --to lora` carries what training changed and nothing else. What training did to make up for
the rounding is of no use on the original model, and what rounding had lost is not lost there: which
of the two is larger can only be measured.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor

from loftq import api
from loftq.eval.perplexity import perplexity
from loftq.integrations.export import open_source

if TYPE_CHECKING:
    from torch import nn

LARGE_GAP = 0.05
"""Nats a token (5 % of perplexity) above which a warning is due."""


@dataclass(frozen=True, kw_only=True)
class LossGap:
    """Mean negative log-likelihoods on the same tokens, in nats a token."""

    packed: float
    """Of the packed model with its trained adapter."""
    original: float
    """Of the original model with the exported adapter."""
    tokens: int
    """Predicted tokens."""
    context: int
    """Tokens of a window."""

    @property
    def gap(self) -> float:
        """original - packed: positive where the move makes it worse."""
        return self.original - self.packed

    @property
    def warning(self) -> str:
        """What to say of a gap above LARGE_GAP; "" below."""
        if self.gap <= LARGE_GAP:
            return ""
        return (
            f"on the original model the loss is {self.gap:.3f} nats a token higher than on the "
            f"packed one ({self.original:.3f}, {self.packed:.3f}): training had made up for "
            "rounding that is not there. Serve the packed weights (another --to), or train on more "
            "bits."
        )

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready."""
        return {**asdict(self), "gap": self.gap}


def lora_gap(
    path: str | Path,
    exported: Path,
    token_ids: Tensor,
    *,
    adapter: str | Path | None = None,
    context: int = 2048,
    windows: int | None = None,
    device: str = "cpu",
    dtype: str = "auto",
    on_window: Callable[[int, int, float], object] | None = None,
) -> LossGap:
    """Loss of the packed model, and of the original with the adapter that was exported from it.

    Both are causal language models and run one after the other, over the same windows of
    `perplexity`.

    Args:
        path: what was exported: an OUT of quantize or a RUN of train.
        exported: folder that `export(path, to="lora")` made.
        token_ids: (n,) integer; held out from training.
        adapter: as given to `export`.
        context: tokens of a window; shortened to what the text and the model have.
        windows: score only the first ones; None = all.
        device: where to run.
        dtype: to load both models in.
        on_window: see `perplexity`.

    Raises:
        ValueError: not such folders, or too little text.
    """
    from loftq.integrations.peft import load_adapter

    source = open_source(path, adapter=adapter)
    limit = int(source.config.get("max_position_embeddings") or context)
    context = min(context, limit, len(token_ids))

    def score(base: nn.Module, lora: Path) -> Any:
        model = load_adapter(base, lora).to(device).eval()
        return perplexity(model, token_ids, context=context, windows=windows, on_window=on_window)

    name = _base_of(exported)
    packed = score(api.load_base(source.folder, dtype=dtype), source.adapter.folder)
    moved = score(_original(name, dtype), exported)
    return LossGap(packed=packed.nll, original=moved.nll, tokens=packed.tokens, context=context)


def _base_of(exported: Path) -> str:
    """The original model that an export of `--to lora` belongs to."""
    path = exported / "loftq_export.json"
    record = json.loads(path.read_bytes()) if path.is_file() else {}
    if record.get("to") != "lora":
        raise ValueError(
            f"{exported}: not made by `loftq export --to lora`. Only such an adapter is for the "
            "original model."
        )
    config = json.loads((exported / "adapter_config.json").read_bytes())
    return str(config["base_model_name_or_path"])


def _original(name: str, dtype: str) -> nn.Module:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(name, dtype=dtype)
