"""The options of `train`, each handed to the part that it is about."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, get_type_hints

from loftq.pipeline.config import QuantizeConfig
from loftq.train.config import CONFIG_VERSION, TrainConfig, unknown_option
from loftq.train.data import DataSettings

CALIBRATION = "calibration"
"""Name, in a training, of the quantization's `data`: the data of a training is what it learns."""


@dataclass(frozen=True, kw_only=True)
class Chosen:
    """Options, sorted."""

    config: TrainConfig
    data: DataSettings
    quantize: Mapping[str, Any]
    """Those that were given, for a MODEL that is full precision."""

    def settings(self, model: str, data: str, validation: str | None) -> dict[str, Any]:
        """config.yaml: everything that decides the result, under the names of the options."""
        rows = {k: v for k, v in self.data.to_dict().items() if k != "version"}
        quantize = {k: list(v) if isinstance(v, tuple) else v for k, v in self.quantize.items()}
        if "data" in quantize:
            quantize[CALIBRATION] = str(quantize.pop("data"))
        named = {"model": model, "data": data, "validation": validation}
        config = {k: v for k, v in self.config.to_dict().items() if k != "version"}
        return {"version": CONFIG_VERSION, **named, **quantize, **rows, **config}


def option_types() -> dict[str, Any]:
    """Every option with its type: of the training, the data, and the quantization."""
    quantize = _types(QuantizeConfig)
    quantize[CALIBRATION] = quantize.pop("data")
    return {**_types(TrainConfig), **_types(DataSettings), **quantize}


def split_options(options: Mapping[str, Any]) -> Chosen:
    """Sort options into settings; `seed` goes to all of them.

    Raises:
        ValueError: an option that does not exist, or a value out of range.
    """
    known = option_types()
    for name in options:
        if name not in known:
            raise ValueError(unknown_option(name, list(known)))

    def of(kind: type) -> dict[str, Any]:
        return {name: value for name, value in options.items() if name in _types(kind)}

    quantize = of(QuantizeConfig)
    if options.get(CALIBRATION) is not None:
        quantize["data"] = options[CALIBRATION]

    return Chosen(
        config=TrainConfig(**of(TrainConfig)),
        data=DataSettings(**of(DataSettings)),
        quantize=quantize,
    )


def _types(kind: type) -> dict[str, Any]:
    hints = get_type_hints(kind)
    return {field.name: hints[field.name] for field in fields(kind)}
