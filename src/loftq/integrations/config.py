"""`quantization_config` of a packed model: its keys, and the checks on them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from transformers.utils.quantization_config import QuantizationConfigMixin

from loftq.formats import FormatSpec, parse_format

METHOD = "loftq"
VERSION = 1


class LoftqConfig(QuantizationConfigMixin):
    """What config.json says about the packed layers.

    Args:
        quant_method: always "loftq".
        version: of these keys; a newer one is refused.
        weights: file name of the weights (index or single file), one that transformers does not
            look for by itself: without loftq it then stops instead of loading random weights. None
            for a model saved again by save_pretrained, whose guard is in the weights.
        layers: module path -> {"format": name, "shape": [out_features, in_features]}.
        modules_to_not_convert: linear-like modules that stay dense.
        backbone: sha256 over the packed tensors, or None once some of them were merged.
        adapter_required: the backbone was chosen together with its start adapter.
    """

    def __init__(
        self,
        *,
        quant_method: str = METHOD,
        version: int = VERSION,
        weights: str | None = None,
        layers: Mapping[str, Mapping[str, Any]] | None = None,
        modules_to_not_convert: list[str] | None = None,
        backbone: str | None = None,
        adapter_required: bool = False,
        **unknown: Any,
    ) -> None:
        if not isinstance(version, int) or version > VERSION:
            raise ValueError(
                f"quantization_config.version={version}: this loftq reads up to {VERSION}. "
                "Upgrade loftq to load this model."
            )
        if unknown:
            raise ValueError(
                f"quantization_config: unknown key {', '.join(map(repr, sorted(unknown)))}. Was "
                "the model made by a newer loftq? Upgrade it, or remove the key."
            )
        if quant_method != METHOD:
            raise ValueError(f"quantization_config.quant_method={quant_method!r}, expected 'loftq'")
        self.quant_method = METHOD
        self.version, self.weights = version, _file_name(weights)
        self.layers = {path: _layer(path, entry) for path, entry in (layers or {}).items()}
        self.modules_to_not_convert = list(modules_to_not_convert or [])
        self.backbone, self.adapter_required = backbone, bool(adapter_required)

    def spec(self, path: str) -> FormatSpec:
        """Format of a packed layer."""
        return parse_format(self.layers[path]["format"])

    def shape(self, path: str) -> tuple[int, int]:
        """(out_features, in_features) of a packed layer."""
        rows, columns = self.layers[path]["shape"]
        return rows, columns


def _layer(path: str, entry: Mapping[str, Any]) -> dict[str, Any]:
    where = f"quantization_config.layers[{path!r}]"
    if set(entry) != {"format", "shape"}:
        found = ", ".join(map(repr, entry)) or "nothing"
        raise ValueError(
            f"{where}: found keys {found}, expected 'format' and 'shape'. A reader that does not "
            "know a key would compute wrong weights: upgrade loftq."
        )
    shape = entry["shape"]
    sizes = isinstance(shape, list | tuple) and len(shape) == 2
    if not sizes or not all(isinstance(n, int) and n > 0 for n in shape):
        raise ValueError(f"{where}: shape {shape!r}, expected two positive integers")
    try:
        parse_format(entry["format"])
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from None
    return {"format": entry["format"], "shape": [int(n) for n in shape]}


def _file_name(weights: str | None) -> str | None:
    plain = weights is None or not {"/", "\\"} & set(weights)
    if not plain or (weights is not None and not weights.endswith((".safetensors", ".json"))):
        raise ValueError(
            f"quantization_config.weights={weights!r}: expected the name of a safetensors file or "
            "index inside the model's folder."
        )
    return weights
