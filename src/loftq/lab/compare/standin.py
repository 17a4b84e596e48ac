"""Models that stand in for those of a recipe, made from its `architecture` alone.

A full-size one is configuration and headers over an empty file: everything that reads headers only
(plan, bytes, memory) sees the model that the recipe names, and not a byte of it exists. A tiny one
has the same architecture, a few blocks of few random weights, and a tokenizer: enough to train a
step, good for nothing else.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping
from math import prod
from pathlib import Path
from typing import Any

SMALL: Mapping[str, int] = {
    "hidden_size": 48, "d_model": 48, "intermediate_size": 64, "d_ff": 64, "encoder_ffn_dim": 64,
    "decoder_ffn_dim": 64, "num_hidden_layers": 2, "encoder_layers": 2, "decoder_layers": 2,
    "num_layers": 2, "num_attention_heads": 4, "encoder_attention_heads": 4, "num_heads": 4,
    "decoder_attention_heads": 4, "num_key_value_heads": 2, "d_kv": 12, "position_buckets": 16,
    "max_position_embeddings": 192,
}  # fmt: skip
"""Sizes of a tiny model, for those that its architecture has."""
SPECIAL = {
    "pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>",
    "cls_token": "<cls>", "sep_token": "<sep>", "mask_token": "<mask>",
}  # fmt: skip
VOCABULARY = 400


def full_size(architecture: Mapping[str, Any], folder: Path) -> Path:
    """A folder that plans as the model of that architecture does; its weights are a hole.

    Raises:
        ValueError: an architecture that transformers does not know.
    """
    import torch

    config = _config(architecture)
    with torch.device("meta"):
        model = _model(config)
    folder.mkdir(parents=True, exist_ok=True)
    config.save_pretrained(folder)
    tied = set(getattr(model, "all_tied_weights_keys", None) or {})
    shapes = {k: tuple(v.shape) for k, v in model.state_dict().items() if k not in tied}
    _write_hole(folder / "model.safetensors", shapes)
    return folder


def _write_hole(path: Path, shapes: Mapping[str, tuple[int, ...]]) -> None:
    """A safetensors file of bfloat16 zeros that takes no disk."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, shape in shapes.items():
        begin, end = end, end + 2 * prod(shape)
        header[name] = {"dtype": "BF16", "shape": list(shape), "data_offsets": [begin, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        os.truncate(file.fileno(), 8 + len(text) + end)


def tiny(architecture: Mapping[str, Any], folder: Path, texts: Iterable[str]) -> Path:
    """A folder with a tiny random model of that architecture and a tokenizer for `texts`.

    Raises:
        ValueError: an architecture that transformers does not know.
    """
    import torch

    tokenizer = tiny_tokenizer(texts)
    small = {key: size for key, size in SMALL.items() if key in architecture}
    ids = _token_ids(tokenizer)
    config = _config({**architecture, **small, **ids, "vocab_size": len(tokenizer)})
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = _model(config)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def tiny_tokenizer(texts: Iterable[str]) -> Any:
    """A byte-level tokenizer with every special token that a family may ask for."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=list(SPECIAL.values()),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    core.train_from_iterator(texts, trainer)
    cls, sep = SPECIAL["cls_token"], SPECIAL["sep_token"]
    core.post_processor = processors.TemplateProcessing(
        single=f"{cls} $A {sep}",
        pair=f"{cls} $A {sep} $B {sep}",
        special_tokens=[(token, core.token_to_id(token)) for token in (cls, sep)],
    )
    return PreTrainedTokenizerFast(tokenizer_object=core, **SPECIAL)


def _token_ids(tokenizer: Any) -> dict[str, int]:
    """Of the special tokens that a configuration names."""
    found = {f"{name}_id": getattr(tokenizer, f"{name}_id") for name in ("pad_token", "bos_token")}
    end = tokenizer.eos_token_id
    return {**found, "eos_token_id": end, "decoder_start_token_id": end}


def _config(architecture: Mapping[str, Any]) -> Any:
    from transformers import AutoConfig

    values = dict(architecture)
    kind = values.pop("model_type", None)
    if kind is None or not values.get("architectures"):
        raise ValueError(
            "architecture: needs model_type and architectures, as in the model's config.json."
        )
    try:
        return AutoConfig.for_model(kind, **values)
    except ValueError as error:
        raise ValueError(f"architecture: transformers knows no model_type {kind!r}.") from error


def _model(config: Any) -> Any:
    """The model in the class that its configuration names, with random weights."""
    import transformers

    (name,) = config.architectures
    kind = getattr(transformers, name, None)
    if kind is None:
        raise ValueError(f"architecture: transformers has no class {name!r}.")
    return kind(config)
