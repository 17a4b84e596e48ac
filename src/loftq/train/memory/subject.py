"""A model as far as training memory is concerned: how to build it, and what its weights become."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from loftq.formats import FormatSpec, parse_format
from loftq.integrations import discover
from loftq.pipeline.accounting import adapter_parameters, packed_bytes
from loftq.pipeline.config import QuantizeConfig
from loftq.pipeline.layout import LayerInfo, ModelLayout
from loftq.pipeline.plan import Plan, planned_formats

CAUSAL = "CAUSAL_LM"
EMBEDDING, HEAD, BACKBONE = "embedding", "head", "backbone"


class UnknownModel(ValueError):
    """Training memory cannot be predicted for this model; says why."""


@dataclass(frozen=True, kw_only=True)
class PackedWeight:
    """One weight that is packed."""

    info: LayerInfo
    spec: FormatSpec
    rank: int
    """Of its adapter; 0 = none."""

    @property
    def nbytes(self) -> int:
        """Packed bytes."""
        return packed_bytes(self.info, self.spec)


@dataclass(frozen=True, kw_only=True)
class Subject:
    """A causal language model with packed layers and adapters."""

    name: str
    build: Callable[[], nn.Module]
    """A fresh dense model on the meta device."""
    weights: tuple[PackedWeight, ...]
    dense: dict[str, int]
    """Parameters that stay dense: embedding, head, backbone (norms, biases, all the rest)."""
    tables: dict[str, str]
    """Module paths: embedding and, unless it is tied, head."""
    tied: bool
    """The head is the embedding's table: its parameters count as the embedding's."""
    hidden: int
    """Width of the hidden state."""
    vocabulary: int
    blocks: int

    @property
    def adapter_parameters(self) -> int:
        """Parameters of all LoRA factors."""
        return sum(adapter_parameters(w.info, w.rank) for w in self.weights)

    @property
    def packed_head(self) -> bool:
        """Whether the head that the loss reads is packed."""
        role = EMBEDDING if self.tied else HEAD
        return any(w.info.module == self.tables[role] for w in self.weights)

    def with_rank(self, rank: int) -> Subject:
        """The same with adapters of another rank."""
        changed = (replace(w, rank=rank if w.rank else 0) for w in self.weights)
        return replace(self, weights=tuple(changed))

    def with_packed_table(self, role: str, spec: FormatSpec) -> Subject:
        """The same with its embedding or head packed without an adapter."""
        if not self.dense[role]:
            return self
        shape = (self.vocabulary, self.dense[role] // self.vocabulary)
        path = self.tables[role]
        info = LayerInfo(
            module=path, tensor=f"{path}.weight", shape=shape, adapted=False,
            kind="embedding" if role == EMBEDDING else "linear",
        )  # fmt: skip
        table = PackedWeight(info=info, spec=spec, rank=0)
        dense = {**self.dense, role: 0}
        return replace(self, weights=(*self.weights, table), dense=dense)


def subject_of_model(
    build: Callable[[], nn.Module], layout: ModelLayout, config: QuantizeConfig, *, name: str
) -> Subject:
    """From a model builder, what was found in the model, and the settings of a quantization.

    Raises:
        UnknownModel: not a causal language model with repeated blocks.
    """
    formats = planned_formats(config, layout)
    weights = tuple(
        PackedWeight(info=info, spec=formats[info.module], rank=config.rank if info.adapted else 0)
        for info in layout.layers
    )
    return _subject(name, build, weights, layout.blocks, layout.task_type)


def subject_of_plan(plan: Plan, folder: Path) -> Subject:
    """From a plan and the folder of the model that was planned."""
    weights = tuple(PackedWeight(info=x.info, spec=x.spec, rank=x.rank) for x in plan.layers)
    layout = plan.layout
    return _subject(
        str(folder), lambda: discover.meta_model(folder), weights, layout.blocks, layout.task_type
    )


def subject_of_output(folder: Path) -> Subject:
    """From an output of `quantize`: config.json and the adapter's configuration.

    Raises:
        UnknownModel: not a packed causal language model.
    """
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    entries = (config.get("quantization_config") or {}).get("layers")
    record = folder / "loftq.json"
    if not entries or not record.is_file():
        raise UnknownModel(f"{folder}: no output of `loftq quantize`. Give the folder it wrote.")
    layers = json.loads(record.read_text(encoding="utf-8"))["layers"]
    weights = tuple(_recorded(layer) for layer in layers)
    model = discover.meta_model(folder)
    layout = discover.describe_model(_without_config(model))
    return _subject(
        str(folder), lambda: discover.meta_model(folder), weights, layout.blocks, layout.task_type
    )


def subject_of_config(config: Any, *, name: str = "", **options: Any) -> Subject:
    """From a configuration of transformers, without weights; options as of `quantize`."""
    from transformers import AutoModelForCausalLM

    def build() -> nn.Module:
        with torch.device("meta"):
            model: nn.Module = AutoModelForCausalLM.from_config(copy.deepcopy(config))
        return model

    chosen = QuantizeConfig.from_dict(options)
    layout = discover.describe_model(
        build(), skip=list(chosen.skip), embeddings=chosen.embeddings, tables=chosen.tables
    )
    return subject_of_model(build, layout, chosen, name=name or layout.architecture)


def _subject(
    name: str,
    build: Callable[[], nn.Module],
    weights: Sequence[PackedWeight],
    blocks: int,
    task: str | None,
) -> Subject:
    if task != CAUSAL or not blocks:
        raise UnknownModel(
            f"{name}: training memory is predicted for causal language models made of repeated "
            "blocks, and this is none. Measure a short run instead: `loftq train` prints its peak."
        )
    model = build()
    tables = _tables(model)
    packed = {w.info.module for w in weights}
    return Subject(
        name=name,
        build=build,
        weights=tuple(weights),
        dense=_dense(model, tables, packed),
        tables=tables,
        tied=HEAD not in tables,
        hidden=model.get_input_embeddings().embedding_dim,  # type: ignore[operator]
        vocabulary=model.get_input_embeddings().num_embeddings,  # type: ignore[operator]
        blocks=blocks,
    )


def _tables(model: nn.Module) -> dict[str, str]:
    """Path of the embedding and, unless it is tied, of the head."""
    paths = {id(module): path for path, module in model.named_modules()}
    embedding = model.get_input_embeddings()  # type: ignore[operator]
    head = model.get_output_embeddings()  # type: ignore[operator]
    found = {EMBEDDING: paths[id(embedding)]}
    if head is not None and head.weight is not embedding.weight:
        found[HEAD] = paths[id(head)]
    return found


def _dense(model: nn.Module, tables: dict[str, str], packed: set[str]) -> dict[str, int]:
    """Parameters that are not packed, by role; a tied weight counts once."""
    roles = {path: role for role, path in tables.items()}
    counts = {EMBEDDING: 0, HEAD: 0, BACKBONE: 0}
    for name, parameter in model.named_parameters():
        module, _, leaf = name.rpartition(".")
        if leaf == "weight" and module in packed:
            continue
        counts[roles.get(module, BACKBONE)] += parameter.numel()
    return counts


def _recorded(layer: dict[str, Any]) -> PackedWeight:
    rows, columns = layer["shape"]
    info = LayerInfo(
        module=layer["name"],
        tensor=layer["tensor"],
        shape=(rows, columns),
        kind=layer["kind"],
        adapted=bool(layer["rank"]),
    )
    return PackedWeight(info=info, spec=parse_format(layer["format"]), rank=layer["rank"])


def _without_config(model: nn.Module) -> nn.Module:
    """The model without the note that it is quantized: as built here it is dense."""
    model.config.__dict__.pop("quantization_config", None)
    return model
