"""What the pipeline knows of a model: its linear-like weights and which of them it may quantize.

Filled by `integrations.discover`, which reads a transformers model; nothing here does.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class LayerInfo:
    """One weight that can be quantized."""

    module: str
    """Path of its module in the model, for example model.layers.0.self_attn.q_proj."""
    tensor: str
    """Name of the weight in the source checkpoint."""
    shape: tuple[int, int]
    """(out_features, in_features), whatever the storage orientation."""
    kind: str = "linear"
    """linear, conv1d (stored (in, out)) or embedding ((num_embeddings, embedding_dim))."""
    depth: int | None = None
    """Index of the repeated block it lives in; None outside of blocks."""
    adapted: bool = True
    """Whether it gets LoRA factors. An embedding or head that is only stored in 8 bits does not."""


@dataclass(frozen=True, kw_only=True)
class KeptInfo:
    """A linear-like weight that keeps its 16 bits, and why."""

    module: str
    parameters: int
    reason: str


@dataclass(frozen=True, kw_only=True)
class ModelLayout:
    """The linear-like weights of a model."""

    model_type: str
    architecture: str
    layers: tuple[LayerInfo, ...]
    kept: tuple[KeptInfo, ...] = ()
    blocks: int = 0
    """Repeated blocks (decoder or encoder layers), for mixed precision by depth."""
    tied: tuple[str, ...] = ()
    """Modules whose weight is tied to another's."""
    task_type: str | None = None
    """PEFT's name of the task, or None."""

    @property
    def coverage(self) -> float:
        """Share of the weights in or beside the blocks that can be quantized, by count.

        Heads, embeddings and classifiers are left out: they stay 16-bit by choice.
        """
        covered = sum(layer.shape[0] * layer.shape[1] for layer in self.layers)
        missed = sum(kept.parameters for kept in self.kept if kept.reason in UNCOVERED)
        return covered / (covered + missed) if covered else 0.0


SHARES = "shares the packed embedding"
"""Reason of a tied head that is packed with its embedding: nothing of it is stored twice."""
UNCOVERED = frozenset({"expert tensors", "vision tower", "convolution", "unsupported layer"})
"""Reasons that mean a missing ability, not a choice: they count against `coverage`."""
