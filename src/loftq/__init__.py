"""Pretrained models in really-packed 4, 3 and 2 bits, with the LoRA adapters that belong to them.

    import loftq

    loftq.quantize("model-folder", "packed", bits=2)
    model = loftq.load("packed", trainable=True)  # a PEFT model

Importing this package loads neither torch nor transformers: the names below are fetched at their
first use. It leaves one thing behind, a hook that registers the format with transformers when that
is imported: `AutoModelForCausalLM.from_pretrained("packed")` works as well.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from loftq.integrations import _hook

if TYPE_CHECKING:
    from loftq.api import export, greedy_adapter, load, plan, quantize, quantize_model
    from loftq.formats import FormatSpec, QuantizedTensor, parse_format
    from loftq.integrations.decode import GraphDecoder
    from loftq.integrations.inference import prepare_for_inference
    from loftq.methods import METHODS
    from loftq.train.prepare import prepare_for_training
    from loftq.train.run import train

__version__ = "0.1.0"

__all__ = [
    "METHODS",
    "FormatSpec",
    "GraphDecoder",
    "QuantizedTensor",
    "__version__",
    "export",
    "greedy_adapter",
    "load",
    "parse_format",
    "plan",
    "prepare_for_inference",
    "prepare_for_training",
    "quantize",
    "quantize_model",
    "train",
]

_HOME = {
    "METHODS": "loftq.methods",
    "FormatSpec": "loftq.formats",
    "GraphDecoder": "loftq.integrations.decode",
    "QuantizedTensor": "loftq.formats",
    "export": "loftq.api",
    "greedy_adapter": "loftq.api",
    "load": "loftq.api",
    "parse_format": "loftq.formats",
    "plan": "loftq.api",
    "prepare_for_inference": "loftq.integrations.inference",
    "prepare_for_training": "loftq.train.prepare",
    "quantize": "loftq.api",
    "quantize_model": "loftq.api",
}


def __getattr__(name: str) -> Any:
    """Fetch a public name from its module at its first use."""
    if name == "train":  # the room of that name, which can be called
        return import_module("loftq.train")
    if name not in _HOME:
        raise AttributeError(f"module 'loftq' has no attribute {name!r}")
    value = globals()[name] = getattr(import_module(_HOME[name]), name)
    return value


def __dir__() -> list[str]:
    """The public names, fetched or not."""
    return sorted({*globals(), *__all__})


_hook.install()
