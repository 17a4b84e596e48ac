"""Attention masks in a capture: none for layers that have none kernel by kernel.

transformers looks at a batch to see that nothing in it is padded or packed, and leaves the mask out
then, so that attention runs in a flash kernel. While a step is captured it cannot look, and hands
every layer a mask.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

from torch import nn

MASK = "attention_mask"
BY_VALUE = (MASK, "position_ids")
"""Inputs whose values decide about the mask; without them shapes do."""


def layers_of(model: nn.Module) -> list[nn.Module]:
    """The layers of a model of transformers that are handed a mask."""
    from transformers.modeling_layers import GradientCheckpointingLayer

    return [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]


class LayerMasks:
    """Notes which layers had no mask, and keeps it from them later.

    Args:
        layers: of `layers_of`.
    """

    def __init__(self, layers: Iterable[nn.Module]) -> None:
        self.layers = list(layers)
        self._without: dict[Hashable, list[nn.Module]] = {}

    @contextmanager
    def noted(self, key: Hashable, batch: Mapping[str, Any]) -> Iterator[None]:
        """Within, a step on a batch of this key is computed kernel by kernel."""
        without: list[nn.Module] = []

        def note(layer: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
            if MASK in kwargs and kwargs[MASK] is None and layer not in without:
                without.append(layer)

        with _hooked([] if any(name in batch for name in BY_VALUE) else self.layers, note):
            yield
        self._without[key] = without

    @contextmanager
    def kept(self, key: Hashable) -> Iterator[None]:
        """Within, a step on a batch of this key is captured."""

        def keep(layer: nn.Module, args: Any, kwargs: dict[str, Any]) -> Any:
            return args, {**kwargs, MASK: None}

        with _hooked(self._without.get(key, []), keep):
            yield


@contextmanager
def _hooked(layers: Iterable[nn.Module], hook: Any) -> Iterator[None]:
    with ExitStack() as stack:
        for layer in layers:
            handle = layer.register_forward_pre_hook(hook, with_kwargs=True)
            stack.callback(handle.remove)
        yield
