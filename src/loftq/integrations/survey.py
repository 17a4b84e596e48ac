"""The verdict on each weight: a layer that can be packed, or the structural reason to keep it."""

from __future__ import annotations

from collections.abc import Collection
from contextlib import suppress
from dataclasses import dataclass

from torch import nn

from loftq.integrations.structure import (
    Anatomy,
    is_convolution,
    is_linear,
    is_small_table,
    quantizable,
    raw_matrices,
    reads_weight,
    weight_of,
)
from loftq.integrations.tensor_names import TensorNames
from loftq.pipeline.layout import LayerInfo


@dataclass(frozen=True, kw_only=True)
class Weight:
    """One linear-like weight and what becomes of it before the user's choices."""

    path: str
    parameters: int
    reason: str | None = None
    """Why it is kept; None = quantize."""
    layer: LayerInfo | None = None
    """What to quantize, where that is possible at all."""


def survey(
    model: nn.Module,
    anatomy: Anatomy,
    names: TensorNames,
    *,
    embeddings: bool,
    tables: Collection[str] = (),
) -> list[Weight]:
    """Every linear-like weight of the model with the structural reason to keep it, if any.

    Args:
        model: may be on the meta device.
        anatomy: of the model.
        names: where its parameters are in the checkpoint.
        embeddings: quantize embeddings and give them adapters.
        tables: what is packed without an adapter: "embedding", "head"; a tied head counts as both.
    """
    weights = []
    widths = _widths(model)
    tied_heads = {anatomy.tied[head] for head in anatomy.heads if head in anatomy.tied}
    for path, module in model.named_modules():
        if is_linear(module):
            reason = _linear_reason(model, anatomy, path, module)
        elif isinstance(module, nn.Embedding):
            packed = "embedding" in tables or ("head" in tables and path in tied_heads)
            reason = _embedding_reason(model, anatomy, path, module, embeddings or packed, widths)
        elif is_convolution(module):
            weights.append(
                Weight(path=path, parameters=weight_of(module).numel(), reason="convolution")
            )
            continue
        else:
            weights += _raw(anatomy, path, module)
            continue
        adapted = embeddings or not isinstance(module, nn.Embedding)
        if reason == "output head" and "head" in tables and path in anatomy.heads:
            adapted, reason = False, None if quantizable(module) else "unsupported layer"
        if reason is None and f"{path}.weight" in names.converted:
            reason = "unsupported layer"
        layer = _layer(anatomy, names, path, module, adapted)
        weights.append(
            Weight(path=path, parameters=weight_of(module).numel(), reason=reason, layer=layer)
        )
    return weights


def _linear_reason(model: nn.Module, anatomy: Anatomy, path: str, module: nn.Module) -> str | None:
    parent = path.rpartition(".")[0]
    if path in anatomy.heads or not anatomy.in_base(path):
        return _head_reason(anatomy, path)
    if _is_router(anatomy, parent, module):
        return "router"
    if quantizable(module) is None or isinstance(
        model.get_submodule(parent), nn.MultiheadAttention
    ):  # the latter takes the weights of its parts without calling them
        return "unsupported layer"
    if anatomy.block_of(path) is None:
        if _names_pooler(path):
            return "pooler"
        if anatomy.blocks:
            return "outside the blocks"
    shared = path in anatomy.tied or path in anatomy.tied.values()
    return "unsupported layer" if shared else None  # one packed weight in two places


def _head_reason(anatomy: Anatomy, path: str) -> str:
    if path in anatomy.tied:
        return "tied to the embedding"
    beside = {head.partition(".")[0] for head in anatomy.heads if not anatomy.in_base(head)}
    if path in anatomy.heads or path.partition(".")[0] in beside:
        return "output head"
    return "pooler" if _names_pooler(path) else "classifier"


def _names_pooler(path: str) -> bool:
    # Only the wording of a reason hangs on this name; the layer is outside the blocks either way.
    return any(part in ("pooler", "pooling") for part in path.split("."))


def _is_router(anatomy: Anatomy, parent: str, module: nn.Module) -> bool:
    """A layer beside the experts with one output for each of them, or one gate for all."""
    beside = [path for path in anatomy.experts if path.rpartition(".")[0] == parent]
    outputs = weight_of(module).shape[0]
    return bool(beside) and (outputs == 1 or outputs in anatomy.expert_counts)


def _embedding_reason(
    model: nn.Module,
    anatomy: Anatomy,
    path: str,
    module: nn.Embedding,
    wanted: bool,
    widths: set[int],
) -> str | None:
    parent, _, name = path.rpartition(".")
    if path in anatomy.tied:
        return "tied to the embedding"
    if not wanted:
        return "embedding"
    if is_small_table(module, widths) or anatomy.block_of(path) is not None:
        return "small table"
    if reads_weight(model.get_submodule(parent), name):
        return "table read without a call"
    return None if quantizable(module) else "unsupported layer"


def _raw(anatomy: Anatomy, path: str, module: nn.Module) -> list[Weight]:
    """Matrices that belong to no layer: experts, routers, and what we do not know."""
    if anatomy.block_of(path) is None:
        return []
    weights = []
    for name, parameter in raw_matrices(module):
        reason = "unsupported layer"
        if path in anatomy.experts:
            reason = "expert tensors"
        elif parameter.dim() == 2 and parameter.shape[0] in anatomy.expert_counts:
            reason = "router"
        weights.append(Weight(path=f"{path}.{name}", parameters=parameter.numel(), reason=reason))
    return weights


def _layer(
    anatomy: Anatomy, names: TensorNames, path: str, module: nn.Module, adapted: bool
) -> LayerInfo | None:
    kind = quantizable(module)
    if kind is None:
        return None
    rows, columns = weight_of(module).shape
    block = anatomy.block_of(path)
    weight = f"{path}.weight"
    return LayerInfo(
        module=path,
        tensor=names.sources.get(weight, weight),
        shape=(columns, rows) if kind == "conv1d" else (rows, columns),
        kind=kind,
        depth=None if block is None else anatomy.blocks[block],
        adapted=adapted,
    )


def _widths(model: nn.Module) -> set[int]:
    """Widths that the model's embeddings can have."""
    config = getattr(model, "config", None)
    widths = {getattr(config, key, None) for key in ("hidden_size", "d_model", "n_embd")}
    getter = getattr(model, "get_input_embeddings", None)
    with suppress(NotImplementedError):  # a model without tokens
        widths.add(getattr(getter() if getter else None, "embedding_dim", None))
    return {width for width in widths if isinstance(width, int)}
