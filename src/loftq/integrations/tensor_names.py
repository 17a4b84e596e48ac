"""Which tensor of a checkpoint is which parameter of the model, as transformers itself would say.

transformers renames checkpoint keys while loading: it adds or strips the base model's prefix and
applies renamings and conversions kept per model type. We run its own function over the tensor names
and read the answer backwards, so that both always agree.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field

from torch import nn

Rename = Callable[[str], tuple[str, list[str]]]
"""Checkpoint key -> (parameter it is loaded as, further parameters made from it by conversion)."""


@dataclass(frozen=True)
class TensorNames:
    """Where the parameters of a model are in a checkpoint."""

    sources: Mapping[str, str] = field(default_factory=dict)
    """Parameter -> tensor that is loaded as it is, perhaps under another name."""
    converted: frozenset[str] = frozenset()
    """Parameters that are split, merged or permuted from tensors while loading."""

    def nearest(self, parameter: str, tensors: Iterable[str]) -> str:
        """A hint for a parameter that was not found."""
        near = difflib.get_close_matches(parameter, tensors, n=1, cutoff=0.6)
        return f"; the nearest name is {near[0]}" if near else ""


def find_tensors(model: nn.Module, tensors: Iterable[str]) -> TensorNames:
    """Match the tensors of a checkpoint with the parameters of `model` (which may be on meta)."""
    parameters = dict.fromkeys(name for name, _ in model.named_parameters(remove_duplicate=False))
    rename = _loader(model) or _by_prefix(model, parameters)
    sources: dict[str, str] = {}
    converted: set[str] = set()
    for tensor in sorted(tensors):
        name, further = rename(tensor)
        if name not in parameters and tensor in parameters:
            name, further = tensor, []  # the loader falls back to the key as it stands, too
        if further:
            converted.update(p for p in further if p in parameters)
        elif name in parameters:
            sources.setdefault(name, tensor)
    return TensorNames(sources, frozenset(converted))


def _loader(model: nn.Module) -> Rename | None:
    """The renaming of transformers' loader, or None for other modules and other versions."""
    try:
        from transformers.conversion_mapping import get_model_conversion_mapping
        from transformers.core_model_loading import WeightConverter, rename_source_key

        transforms = get_model_conversion_mapping(model)
    except (ImportError, AttributeError, TypeError):
        return None
    converters = [t for t in transforms if isinstance(t, WeightConverter)]
    renamings = [t for t in transforms if not isinstance(t, WeightConverter)]
    targets = {p: c.target_patterns for c in converters for p in c.source_patterns}
    state = model.state_dict()
    prefix = model.base_model_prefix

    def rename(tensor: str) -> tuple[str, list[str]]:
        name, pattern = rename_source_key(tensor, renamings, converters, prefix, state)
        if pattern is None:
            return name, []
        first = targets[pattern][0]
        return name, [name, *(name.replace(first, target) for target in targets[pattern])]

    return rename


def _by_prefix(model: nn.Module, parameters: Mapping[str, None]) -> Rename:
    """With or without the base model's prefix, nothing else."""
    prefix = f"{getattr(model, 'base_model_prefix', '')}.".lstrip(".")

    def rename(tensor: str) -> tuple[str, list[str]]:
        candidates = (tensor, prefix + tensor, tensor.removeprefix(prefix))
        return next((name for name in candidates if name in parameters), tensor), []

    return rename
