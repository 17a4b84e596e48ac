"""From what a user names, a folder or hub id, to something that `fit` and `predict` can vary."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

from loftq.checkpoint import open_checkpoint
from loftq.integrations import discover
from loftq.integrations.source import read_config
from loftq.pipeline.config import QuantizeConfig
from loftq.pipeline.layout import ModelLayout
from loftq.train.memory.fit import Configure
from loftq.train.memory.subject import Subject, subject_of_model


def configurable(model: str | Path, options: Mapping[str, Any]) -> Configure:
    """A function of bits, rank, embedding and head that gives the model quantized so.

    Args:
        model: a full-precision model; only headers are read.
        options: further fields of QuantizeConfig (skip, targets, format, ...), the same for all.

    Raises:
        SourceError: the model cannot be read or used.
        ValueError: a measured allocation, whose bits are chosen by other things than memory.
    """
    folder = discover.resolve_source(model)
    discover.refuse_unusable(folder)
    shapes = {name: entry.shape for name, entry in open_checkpoint(folder).tensors.items()}
    base = QuantizeConfig.from_dict(options)
    if base.allocation_row().measured:
        raise ValueError(
            f"allocation={base.allocation}: memory chooses one width for all layers. Leave one of "
            "the two out, or quantize first (loftq quantize MODEL -o OUT) and train OUT within it."
        )

    @cache
    def layout(tables: frozenset[str]) -> ModelLayout:
        return discover.describe_folder(
            folder, shapes, targets=list(base.targets) or None, skip=list(base.skip),
            embeddings=base.embeddings, tables=tables,
        )  # fmt: skip

    def configure(**choices: Any) -> Subject:
        config = replace(base, **choices)
        return subject_of_model(
            lambda: discover.meta_model(folder), layout(config.tables), config, name=str(folder)
        )

    return configure


def context_limit(model: str | Path) -> int | None:
    """Longest context of a model, as its configuration says."""
    config = read_config(discover.resolve_source(model))
    text = config.get("text_config") or config
    found = text.get("max_position_embeddings") or text.get("n_positions")
    return found if isinstance(found, int) and found > 0 else None
