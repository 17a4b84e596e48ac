"""What a model is made of: which weights can be packed, where they are stored, what stays 16-bit.

Nothing here goes by the names of layers. A model is a stack of repeated blocks between an embedding
and a head: the linear layers inside the blocks are quantized, everything outside is kept, with the
reason. Depth counts the blocks of the text model in module order, so a decoder goes on where its
encoder ends; blocks of a vision or audio tower have none, and mixed precision by depth leaves them
at the default format.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, AutoModel, PreTrainedModel
from transformers.models.auto import modeling_auto

from loftq.allocation import matches, unmatched
from loftq.integrations.source import (
    SourceError,
    architectures,
    read_config,
    refuse_unusable,
    remote_code_problem,
    resolve_source,
)
from loftq.integrations.structure import Anatomy, examine, quantizable, tied_modules
from loftq.integrations.survey import Weight, survey
from loftq.integrations.tensor_names import TensorNames, find_tensors
from loftq.pipeline.layout import SHARES, KeptInfo, LayerInfo, ModelLayout

__all__ = [
    "SourceError",
    "build_model",
    "describe_folder",
    "describe_model",
    "load_config",
    "load_tokenizer",
    "model_class",
    "quantizable",
    "refuse_unusable",
    "resolve_source",
    "task_type",
]

ON_REQUEST = frozenset({"pooler", "outside the blocks"})
"""Reasons to keep a layer that yield to a target naming that layer alone."""

_TASKS = (
    ("MODEL_FOR_CAUSAL_LM_MAPPING_NAMES", "CAUSAL_LM"),
    ("MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES", "CAUSAL_LM"),
    ("MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES", "SEQ_2_SEQ_LM"),
    ("MODEL_FOR_SPEECH_SEQ_2_SEQ_MAPPING_NAMES", "SEQ_2_SEQ_LM"),
    ("MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES", "SEQ_CLS"),
    ("MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING_NAMES", "TOKEN_CLS"),
    ("MODEL_FOR_QUESTION_ANSWERING_MAPPING_NAMES", "QUESTION_ANS"),
    ("MODEL_MAPPING_NAMES", "FEATURE_EXTRACTION"),
)


def describe_folder(
    folder: Path,
    tensors: Mapping[str, Sequence[int]],
    *,
    targets: Sequence[str] | None = None,
    skip: Sequence[str] = (),
    embeddings: bool = False,
    tables: Collection[str] = (),
) -> ModelLayout:
    """The layout of the model in `folder`, without reading a weight.

    The model is built on the meta device, in the class config.json names, else as AutoModel would.

    Args:
        folder: holds config.json.
        tensors: name -> shape of every tensor of the checkpoint.
        targets: patterns (see `allocation.patterns`) that narrow the linears of the blocks; a
            pattern that selects none of them may name a pooler or projection outside. None = all.
        skip: patterns of modules to leave alone.
        embeddings: quantize the embeddings too; refused where the head shares them.
        tables: "embedding", "head": packed without an adapter; a tied head shares the packed bytes.

    Raises:
        SourceError: the model cannot be built, or has nothing to quantize.
        ValueError: a pattern selects nothing, a tensor is missing or has another shape (all are
            listed).
    """
    model = meta_model(folder)
    names = find_tensors(model, tensors)
    layout = _describe(
        model, names, targets=targets, skip=skip, embeddings=embeddings, tables=tables
    )
    _refuse_copies(layout.layers, tied_modules(model), names)
    problems = [p for layer in layout.layers if (p := _tensor_problem(layer, tensors, names))]
    if problems:
        shown = "\n".join(problems[:20])
        more = f"\n... and {len(problems) - 20} more" if len(problems) > 20 else ""
        raise ValueError(
            f"{folder}: {len(problems)} of {len(layout.layers)} weights are not in the checkpoint "
            f"as {layout.architecture} needs them:\n{shown}{more}\nCheck that config.json belongs "
            "to these weights, or leave the layers out with skip."
        )
    return layout


def describe_model(
    model: nn.Module,
    *,
    targets: Sequence[str] | None = None,
    skip: Sequence[str] = (),
    embeddings: bool = False,
    tables: Collection[str] = (),
) -> ModelLayout:
    """The layout of a loaded model; tensors are named after its modules.

    Raises:
        SourceError: already quantized, already carries adapters, or nothing to quantize.
        ValueError: a pattern selects nothing.
    """
    kind = type(model).__name__
    if getattr(getattr(model, "config", None), "quantization_config", None) is not None:
        raise SourceError(f"{kind}: already quantized. Load the original model and quantize that.")
    if hasattr(model, "peft_config"):
        raise SourceError(
            f"{kind}: carries adapters. Merge them first (model.merge_and_unload()), or quantize "
            "the model they are for."
        )
    parameters = dict.fromkeys(name for name, _ in model.named_parameters(remove_duplicate=False))
    names = TensorNames({name: name for name in parameters})
    return _describe(model, names, targets=targets, skip=skip, embeddings=embeddings, tables=tables)


def task_type(architecture: str) -> str | None:
    """PEFT's TaskType for a transformers class name, or None where PEFT has none (masked LM)."""
    for table, task in _TASKS:
        for names in getattr(modeling_auto, table, {}).values():
            if architecture == names or (isinstance(names, tuple | list) and architecture in names):
                return task
    return None


def model_class(folder: Path) -> Any:
    """The transformers class of the model in `folder`: the one config.json names, else AutoModel.

    A name counts only when it is a transformers model class for this very configuration.
    """
    return _named_class(read_config(folder), load_config(folder)) or AutoModel


def load_config(folder: Path) -> Any:
    """transformers' configuration of the model in `folder`."""
    problem = remote_code_problem(folder, read_config(folder))
    if problem:
        raise SourceError(problem)
    try:
        return AutoConfig.from_pretrained(folder, trust_remote_code=False, local_files_only=True)
    except Exception as error:  # each configuration class checks its values in its own way
        raise SourceError(
            f"{folder / 'config.json'}: transformers does not accept it ({error}). Take the file "
            "from the original model."
        ) from error


def load_tokenizer(folder: Path) -> Any:
    """The tokenizer in `folder`.

    Raises:
        SourceError: there is none, or transformers does not accept it.
    """
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(folder)
    except Exception as error:  # each tokenizer class fails in its own way
        reason = str(error).strip().splitlines()
        raise SourceError(
            f"{folder}: its tokenizer cannot be loaded ({reason[0] if reason else error!r}). Copy "
            "the tokenizer files of the original model there."
        ) from error


def _named_class(config: Mapping[str, Any], loaded: Any) -> Any:
    import transformers

    for name in architectures(config):
        found = getattr(transformers, name, None) if name.isidentifier() else None
        if isinstance(found, type) and issubclass(found, PreTrainedModel):
            kind = getattr(found, "config_class", None)
            if isinstance(kind, type) and isinstance(loaded, kind):
                return found
    return None


def build_model(folder: Path) -> nn.Module:
    """The model of config.json with fresh weights, in the class it names, else as AutoModel would.

    Raises:
        SourceError: transformers cannot build it.
    """
    config = load_config(folder)
    named = _named_class(read_config(folder), config)
    try:
        return named(config) if named else AutoModel.from_config(config)
    except Exception as error:  # constructors fail in as many ways as there are models
        kind = named.__name__ if named else "AutoModel"
        raise SourceError(
            f"{folder}: {kind} cannot be built from config.json ({error}). Check the file, and "
            "that the packages this model needs are installed."
        ) from error


def meta_model(folder: Path) -> nn.Module:
    """The same on the meta device: shapes without memory."""
    with torch.device("meta"):
        return build_model(folder)


def _describe(
    model: nn.Module,
    names: TensorNames,
    *,
    targets: Sequence[str] | None,
    skip: Sequence[str],
    embeddings: bool,
    tables: Collection[str],
) -> ModelLayout:
    anatomy = examine(model)
    found = survey(model, anatomy, names, embeddings=embeddings, tables=tables)
    weights = _choose(found, targets, skip)
    layers = tuple(w.layer for w in weights if w.reason is None and w.layer is not None)
    packed = {layer.module for layer in layers}
    kept = tuple(
        KeptInfo(
            module=w.path,
            parameters=w.parameters,
            reason=SHARES if anatomy.tied.get(w.path) in packed else w.reason,
        )
        for w in weights
        if w.reason is not None
    )
    name = type(model).__name__
    if not layers:
        listed = (
            ", ".join(f"{k.module} ({k.reason})" for k in kept[:8]) or "no linear layers at all"
        )
        raise SourceError(f"{name}: nothing to quantize: {listed}. Choose other targets or model.")
    _refuse_unpacked(model, layers, anatomy, tables)
    _refuse_shared(model, layers, anatomy.tied)
    return ModelLayout(
        model_type=getattr(getattr(model, "config", None), "model_type", None) or "",
        architecture=name,
        layers=layers,
        kept=kept,
        blocks=anatomy.depth,
        tied=tuple(anatomy.tied),
        task_type=task_type(name),
    )


def _choose(
    weights: Sequence[Weight], targets: Sequence[str] | None, skip: Sequence[str]
) -> list[Weight]:
    """Apply the user's targets and skip; every pattern must do something."""
    paths = [w.path for w in weights]
    complaints = [unmatched(targets or (), paths, where="targets")]
    complaints.append(unmatched(skip, paths, where="skip"))
    if targets is not None:
        ready = [w.layer for w in weights if w.layer and w.reason is None]
        chosen = {x.module for x in ready if x.kind == "embedding" or not x.adapted}
        for pattern in targets:
            hits = [w for w in weights if matches(pattern, w.path)]
            free = [w for w in hits if w.reason is None]
            free = free or [w for w in hits if w.reason in ON_REQUEST and w.layer is not None]
            chosen.update(w.path for w in free)
            if hits and not free:
                complaints.append(_forbidden(pattern, hits))
        weights = [_target(w, w.path in chosen) for w in weights]
    if any(complaints):
        raise ValueError(" ".join(filter(None, complaints)))
    skipped = {path for path in paths if any(matches(pattern, path) for pattern in skip)}
    return [
        replace(w, reason="skipped") if w.path in skipped and w.reason is None else w
        for w in weights
    ]


def _target(weight: Weight, chosen: bool) -> Weight:
    if chosen:
        return replace(weight, reason=None) if weight.reason in ON_REQUEST else weight
    return weight if weight.reason is not None else replace(weight, reason="not a target")


def _forbidden(pattern: str, hits: Sequence[Weight]) -> str:
    reasons = dict.fromkeys(w.reason for w in hits)
    remedy = "Set embeddings to quantize embeddings." if "embedding" in reasons else "Leave it out."
    return (
        f"targets: {pattern!r} selects only {hits[0].path}"
        f"{f' and {len(hits) - 1} more' if len(hits) > 1 else ''}, kept as "
        f"{' / '.join(map(str, reasons))}. {remedy}"
    )


def _refuse_unpacked(
    model: nn.Module, layers: Sequence[LayerInfo], anatomy: Anatomy, tables: Collection[str]
) -> None:
    """A table that was asked for in 8 bits and cannot be packed is said, not left out."""
    packed = {layer.module for layer in layers if not layer.adapted}
    owners = {anatomy.tied.get(head, head) for head in anatomy.heads}
    with_rows = {p for p, m in model.named_modules() if isinstance(m, nn.Embedding)}
    for key, paths in (("embedding", with_rows), ("head", owners)):
        if key in tables and not paths & packed:
            kinds = {type(model.get_submodule(path)).__name__ for path in paths}
            found = ", ".join(sorted(kinds)) or "none"
            raise ValueError(
                f"{key}=8: no {key} of {type(model).__name__} can be packed (found: {found}). "
                f"Leave it at 16 bits: {key}=16."
            )


def _refuse_shared(model: nn.Module, layers: Sequence[LayerInfo], tied: Mapping[str, str]) -> None:
    """Whatever is tied to a packed embedding must be able to read its packed bytes."""
    for layer in layers:
        others = [module for module, owner in tied.items() if owner == layer.module]
        if layer.kind == "embedding" and layer.adapted and others:
            raise ValueError(
                f"{layer.module}: its weight is also that of {', '.join(others)}, which would do "
                "without the adapter that an embedding packed with embeddings=true needs. Pack the "
                f"two without one (embedding=8), or skip this one (skip={layer.module!r})."
            )
        foreign = [m for m in others if quantizable(model.get_submodule(m)) is None]
        if layer.kind == "embedding" and foreign:
            kind = type(model.get_submodule(foreign[0])).__name__
            raise ValueError(
                f"{layer.module}: its weight is also that of {foreign[0]}, a {kind}, which cannot "
                "read packed bytes. Leave both at 16 bits: embedding=16 head=16."
            )


def _refuse_copies(
    layers: Sequence[LayerInfo], tied: Mapping[str, str], names: TensorNames
) -> None:
    """A checkpoint that stores a tied weight twice would have it packed and dense."""
    packed = {layer.module: layer for layer in layers}
    for module, owner in tied.items():
        layer = packed.get(owner)
        copy = names.sources.get(f"{module}.weight")
        if layer is not None and copy is not None and copy != layer.tensor:
            raise ValueError(
                f"{copy}: the config ties it to {layer.tensor}, and the checkpoint stores both. "
                "Save the model once more with save_pretrained, which stores one of them."
            )


def _tensor_problem(
    layer: LayerInfo, tensors: Mapping[str, Sequence[int]], names: TensorNames
) -> str | None:
    expected = layer.shape[::-1] if layer.kind == "conv1d" else layer.shape
    found = tensors.get(layer.tensor)
    if found is None or f"{layer.module}.weight" not in names.sources:
        return f"{layer.tensor}: not found{names.nearest(layer.tensor, tensors)}"
    if tuple(found) != expected:
        return f"{layer.tensor}: shape {tuple(found)}, expected {expected}"
    return None
