"""A model in the class of a task, with a head that is trained, and an adapter on its layers.

A packed backbone is stored in the class that it was quantized as, often without a head or with
another one. transformers loads it into the class of the task and makes the missing head; the start
adapter names its layers by the stored class and is carried over by name. PEFT's `modules_to_save`
trains the head in full and stores it with the adapter.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from loftq.integrations.discover import load_config
from loftq.integrations.peft import backbone_of, check_lineage
from loftq.nn import packed_layers
from loftq.pipeline.plan import ADAPTER_PREFIX

if TYPE_CHECKING:
    from peft import PeftModel

TASK_TYPES: Mapping[str, str | None] = {
    "AutoModelForSequenceClassification": "SEQ_CLS",
    "AutoModelForMultipleChoice": None,
    "AutoModelForQuestionAnswering": "QUESTION_ANS",
    "AutoModelForCausalLM": "CAUSAL_LM",
    "AutoModelForSeq2SeqLM": "SEQ_2_SEQ_LM",
}
"""PEFT's name of what a class of transformers is for; None = it has none, and passes all on."""


class HeadError(ValueError):
    """A model that has no class for the task, or an adapter that does not fit into it."""


@dataclass(frozen=True)
class Headed:
    """A model in the class of a task."""

    model: nn.Module
    head: tuple[str, ...]
    """Modules that are trained in full: what is new, and a pooler before it."""
    new: tuple[str, ...] = ()
    """Tensors that the folder has no weights for: those of a fresh head."""


def load_headed(
    folder: Path, auto_class: str, *, new_head: bool, seed: int, **options: Any
) -> Headed:
    """The model of `folder`, packed or not, in the class that `auto_class` finds for it.

    Args:
        folder: output of `quantize`, or a full-precision model.
        auto_class: a key of TASK_TYPES.
        new_head: whether the class may have a head that the folder has no weights for.
        seed: of the new head.
        **options: of from_pretrained (dtype, num_labels, device_map, ...).

    Raises:
        HeadError: transformers has no such class for this model, or weights are missing.
    """
    import transformers

    require_class(folder, auto_class)
    torch.manual_seed(seed)
    with _quiet():
        model, found = getattr(transformers, auto_class).from_pretrained(
            folder, output_loading_info=True, ignore_mismatched_sizes=new_head, **options
        )
    # A head for other classes is replaced as if there were none.
    other = [key if isinstance(key, str) else key[0] for key in found["mismatched_keys"]]
    other += _refit_(model, seed) if new_head else []
    missing = sorted({*found["missing_keys"], *other})
    if missing and not new_head:
        raise HeadError(
            f"{folder}: has no weights for {missing[0]} (and {len(missing) - 1} more) of "
            f"{type(model).__name__}. Give a model of that class."
        )
    return Headed(model, _head(model, missing) if new_head else (), tuple(missing))


def require_class(folder: Path, auto_class: str) -> None:
    """Refuse a model without the class, and a class that finds no backbone in any checkpoint.

    transformers' span classes of Llama and eleven families like it keep the backbone as
    `transformer`, all their other classes as `model`: its from_pretrained finds none of the weights
    and leaves random ones behind a warning.

    Raises:
        HeadError: either of them.
    """
    import transformers

    config = type(load_config(folder))
    wanted: Any = getattr(transformers, auto_class)._model_mapping.get(config, None)
    if wanted is None:
        raise HeadError(
            f"{folder}: transformers has no {auto_class} for {config.model_type}. Choose another "
            "kind of model, or a task that this one can do."
        )
    usual: Any = transformers.AutoModel._model_mapping.get(config, None)
    places = [getattr(found, "base_model_prefix", None) for found in (wanted, usual)]
    if None not in places and places[0] != places[1]:  # None: several classes
        raise HeadError(
            f"{folder}: {wanted.__name__} keeps its backbone under {places[0]!r}, "
            f"files of this family under {places[1]!r}, so that transformers "
            "loads none of its weights. Take an encoder (BERT, MPNet, DeBERTa) for this task."
        )


def _refit_(model: Any, seed: int) -> list[str]:
    """Parameters of another shape than the config says, made anew in place; their names.

    transformers 5.17 looks at no shape where it loads a quantized model.
    """
    with torch.device("meta"):
        shapes = {name: p.shape for name, p in type(model)(model.config).named_parameters()}
    wrong = {n: p for n, p in model.named_parameters() if n in shapes and p.shape != shapes[n]}
    for name, parameter in wrong.items():
        owner, _, attribute = name.rpartition(".")
        empty = torch.empty(shapes[name], dtype=parameter.dtype, device=parameter.device)
        setattr(model.get_submodule(owner), attribute, nn.Parameter(empty))
    torch.manual_seed(seed)
    for owner in dict.fromkeys(name.rpartition(".")[0] for name in wrong):
        model._init_weights(model.get_submodule(owner))
    return list(wrong)


def _head(model: nn.Module, missing: Sequence[str]) -> tuple[str, ...]:
    """Paths of the outermost modules with parameters outside the backbone, and of a pooler."""
    base = getattr(model, "base_model_prefix", "")
    inner = getattr(model, base, None) if base else None
    outside = [
        name
        for name, child in model.named_children()
        # A class without the attribute of its backbone has the backbone's parts as children.
        if (any(key.startswith(f"{name}.") for key in missing) if inner is None else name != base)
        and _has_weights(child)
    ]
    poolers = [
        f"{base}.{name}"
        for name, child in (inner.named_children() if isinstance(inner, nn.Module) else ())
        if "pooler" in name and _has_weights(child) and not packed_layers(child)
    ]
    found = (*outside, *poolers)
    lost = [key for key in missing if not key.startswith(tuple(f"{name}." for name in found))]
    if lost:
        raise HeadError(
            f"{type(model).__name__}: no weights for {lost[0]} ({len(lost)} such tensors), which "
            "is no part of its head. The folder is not a model of this kind, or damaged."
        )
    return found


def attach_start(headed: Headed, adapter: Path, auto_class: str) -> PeftModel:
    """The packed model with the LoRA of `adapter` on its layers, trainable, and its head.

    Args:
        headed: from `load_headed`.
        adapter: start adapter of the backbone, or one trained on it; a head in it is left out.
        auto_class: of the model.

    Raises:
        LineageError: the adapter belongs to another backbone.
        HeadError: it has layers that the model lacks.
    """
    from peft import (
        LoraConfig,
        get_peft_model,
        get_peft_model_state_dict,
        set_peft_model_state_dict,
    )
    from safetensors.torch import load_file

    check_lineage(adapter, backbone_of(headed.model))
    stored = load_file(adapter / "adapter_model.safetensors")
    state = {key: value for key, value in stored.items() if ".lora_" in key}
    paths = _renamed(headed.model, {_path(key) for key in state}, adapter)
    config = LoraConfig.from_pretrained(str(adapter))
    config.target_modules = set(paths.values())
    for name in ("rank_pattern", "alpha_pattern"):
        pattern = getattr(config, name) or {}
        setattr(config, name, {paths.get(key, key): value for key, value in pattern.items()})
    _for_training(config, headed, auto_class)
    model = get_peft_model(headed.model, config)
    found = {key.replace(_path(key), paths[_path(key)], 1): value for key, value in state.items()}
    there = get_peft_model_state_dict(model)
    assert {key for key in there if ".lora_" in key} == found.keys(), "another set of layers"
    set_peft_model_state_dict(model, there | found)  # wants the head, too
    return _in_float32(model)


def attach_fresh(
    headed: Headed,
    modules: Sequence[str],
    auto_class: str,
    *,
    rank: int,
    alpha: float,
    rslora: bool = False,
) -> PeftModel:
    """A full-precision model with a new LoRA, whose product is zero, and its head.

    Args:
        headed: from `load_headed`.
        modules: paths of the linear layers in the class that the folder names.
        auto_class: of the model.
        rank: of the adapters.
        alpha: LoRA's.
        rslora: scale by alpha / sqrt(rank).

    Raises:
        HeadError: the model lacks one of the modules.
    """
    from peft import LoraConfig, get_peft_model

    paths = _renamed(headed.model, set(modules), Path(type(headed.model).__name__))
    config = LoraConfig(
        r=rank, lora_alpha=alpha, use_rslora=rslora, target_modules=set(paths.values())
    )
    _for_training(config, headed, auto_class)
    return _in_float32(get_peft_model(headed.model, config))


def _for_training(config: Any, headed: Headed, auto_class: str) -> None:
    config.task_type = TASK_TYPES[auto_class]
    config.modules_to_save = list(headed.head) or None
    config.inference_mode = False


def _in_float32(model: PeftModel) -> PeftModel:
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
    return model


def _renamed(model: nn.Module, paths: set[str], where: Path) -> Mapping[str, str]:
    """Path in the stored class -> path in this model, whose backbone may be nested differently."""
    modules = dict(model.named_modules())
    base = getattr(model, "base_model_prefix", "")
    prefix = f"{base}." if base else ""
    found: dict[str, str] = {}
    for path in sorted(paths):
        candidates = (path, prefix + path, path.removeprefix(prefix))
        here = next((name for name in candidates if name in modules), None)
        if here is None:
            raise HeadError(
                f"{where}: has a layer {path}, which {type(model).__name__} lacks. Quantize the "
                f"model without it (skip={path!r}), or as the class of the task."
            )
        found[path] = here
    return found


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without transformers' list of what it did not find, which is looked through here."""
    from transformers.utils import logging

    before = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(before)


def _has_weights(module: nn.Module) -> bool:
    return next(module.parameters(), None) is not None


def _path(key: str) -> str:
    """Path of the layer of a key in an adapter's file."""
    return key.removeprefix(ADAPTER_PREFIX).partition(".lora_")[0]
