"""The options of `train`, each handed to the part that it is about."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, get_type_hints

from loftq.pipeline.config import QuantizeConfig
from loftq.train.config import CONFIG_VERSION, TrainConfig, unknown_option
from loftq.train.data import DataSettings

RENAMED = {"data_format": "format"}
"""Options of the data whose own name means something else for a quantization."""
EVERYWHERE = "seed"


@dataclass(frozen=True, kw_only=True)
class Chosen:
    """Options, sorted."""

    config: TrainConfig
    data: DataSettings
    quantize: Mapping[str, Any]
    """Those that were given, for a MODEL that is full precision."""

    def settings(self, model: str, data: str, validation: str | None) -> dict[str, Any]:
        """config.yaml: everything that decides the result, under the names of the options."""
        outer = {own: name for name, own in RENAMED.items()}
        rows = {outer.get(k, k): v for k, v in self.data.to_dict().items() if k != "version"}
        quantize = {k: list(v) if isinstance(v, tuple) else v for k, v in self.quantize.items()}
        named = {"model": model, "data": data, "validation": validation}
        config = {k: v for k, v in self.config.to_dict().items() if k != "version"}
        return {"version": CONFIG_VERSION, **named, **quantize, **rows, **config}


def option_types() -> dict[str, Any]:
    """Every option with its type: of the training, the data, and the quantization."""
    outer = {own: name for name, own in RENAMED.items()}
    quantize = _types(QuantizeConfig)
    data = {outer.get(name, name): hint for name, hint in _types(DataSettings).items()}
    return {**_types(TrainConfig), **data, **quantize}


def split_options(options: Mapping[str, Any]) -> Chosen:
    """Sort options into settings; `seed` goes to all of them.

    Raises:
        ValueError: an option that does not exist, or a value out of range.
    """
    known = option_types()
    for name in options:
        if name not in known:
            raise ValueError(unknown_option(name, list(known)))
    data = {RENAMED.get(name, name): v for name, v in options.items() if _is_of_data(name)}
    return Chosen(
        config=TrainConfig(**{k: v for k, v in options.items() if k in _types(TrainConfig)}),
        data=DataSettings(**data),
        quantize={k: v for k, v in options.items() if k in _types(QuantizeConfig)},
    )


def _is_of_data(name: str) -> bool:
    return name in RENAMED or (name in _types(DataSettings) and name not in RENAMED.values())


def _types(kind: type) -> dict[str, Any]:
    hints = get_type_hints(kind)
    return {field.name: hints[field.name] for field in fields(kind)}
