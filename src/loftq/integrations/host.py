"""The token embedding on the host: its rows go to the device, the table does not.

A step looks up a few thousand rows of a table that can take a gigabyte. The table is frozen, so it
can stay in host memory, packed or not: a lookup runs there and moves the rows. The table is no
longer a Parameter, so that whoever moves, counts or synchronises the parameters of a model leaves
it where it is; state_dict still has it, under the same names.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from loftq.formats import COMPONENTS
from loftq.integrations.embedding import QuantEmbedding

PLACES = ("device", "host")


class HostTable(nn.Module):
    """Mixin in front of an embedding class: lookup on the CPU, rows to the model's device."""

    rows_device: torch.device
    """Where rows go: the device that the module was last moved to."""

    def hold_(self, device: torch.device) -> None:
        """Take the table out of the parameters and put it on the CPU."""
        self.rows_device = device
        for name, parameter in list(self._parameters.items()):
            if parameter is not None:
                del self._parameters[name]
                object.__setattr__(self, name, parameter.detach().cpu())

    def tables(self) -> dict[str, Tensor]:
        """The tensors of the table by their names in state_dict."""
        found = {name: self.__dict__.get(name) for name in ("weight", *COMPONENTS)}
        return {name: tensor for name, tensor in found.items() if tensor is not None}

    def forward(self, input: Tensor) -> Tensor:
        """Indices (...) on any device -> rows (..., embedding_dim) on `rows_device`."""
        rows: Tensor = super().forward(input.to("cpu"))
        return rows.to(self.rows_device, non_blocking=True)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        # What happens to an empty tensor of the same kind tells where to and in which dtype.
        probe = fn(torch.empty(0, dtype=self._dtype, device=self.rows_device))
        self.rows_device = probe.device
        if probe.is_floating_point():
            self._cast(probe.dtype)
        return self

    @property
    def _dtype(self) -> torch.dtype:
        raise NotImplementedError

    def _cast(self, dtype: torch.dtype) -> None:
        raise NotImplementedError

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        for name, table in self.tables().items():
            destination[prefix + name] = table

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *args: Any) -> None:
        for name, table in self.tables().items():
            if prefix + name in state_dict:
                table.copy_(state_dict.pop(prefix + name))
        super()._load_from_state_dict(state_dict, prefix, *args)


class HostEmbedding(HostTable, nn.Embedding):
    """nn.Embedding with its frozen table on the host."""

    @property
    def _dtype(self) -> torch.dtype:
        return self.weight.dtype

    def _cast(self, dtype: torch.dtype) -> None:
        object.__setattr__(self, "weight", self.weight.to(dtype))


class HostQuantEmbedding(HostTable, QuantEmbedding):
    """QuantEmbedding with its packed table on the host."""

    @property
    def _dtype(self) -> torch.dtype:
        return self.compute_dtype

    def _cast(self, dtype: torch.dtype) -> None:
        self.compute_dtype = dtype

    def components(self) -> dict[str, Any]:
        """The packed tensors, which are no Parameters here."""
        return self.tables()

    def become_dense_(self, weight: Tensor) -> None:
        """Refused: a dense table belongs to a model that was loaded for it."""
        raise RuntimeError(
            f"{self.label}: its table is on the host. To make the model dense, load it without "
            'embedding="host".'
        )


HOST_CLASSES: Mapping[type[nn.Module], type[HostTable]] = {
    nn.Embedding: HostEmbedding,
    QuantEmbedding: HostQuantEmbedding,
}


def keep_on_host_(model: nn.Module) -> HostTable:
    """Keep the token embedding of `model` on the CPU, wherever the model goes from now on.

    Raises:
        ValueError: the head needs the same table on the device, or the class of the embedding
            computes something of its own.
    """
    table = model.get_input_embeddings()  # type: ignore[operator]
    head = model.get_output_embeddings()  # type: ignore[operator]
    if isinstance(table, HostTable):
        return table
    own, other = (dict(m.named_parameters()) if m is not None else {} for m in (table, head))
    if any(p is q for p in own.values() for q in other.values()):
        raise ValueError(
            f'{type(model).__name__}: embedding="host" saves nothing here, since the head shares '
            "the table and needs it on the device. Quantize with embedding=8 to halve it."
        )
    kind = HOST_CLASSES.get(type(table))
    if kind is None:
        raise ValueError(
            f'{type(model).__name__}: its embedding is a {type(table).__name__}; embedding="host" '
            "knows plain and packed tables only. Leave it on the device."
        )
    device = next(p.device for p in own.values())
    table.__class__ = kind
    table.hold_(device)
    return table


def one_device(device_map: Any) -> torch.device | None:
    """The single device of a device_map, or None where none was asked for.

    Raises:
        ValueError: the map spreads the model.
    """
    if device_map is None:
        return None
    places = set(device_map.values()) if isinstance(device_map, Mapping) else {device_map}
    if len(places) != 1 or places & {"auto", "balanced", "balanced_low_0", "sequential", "disk"}:
        raise ValueError(
            f'device_map={device_map!r}: embedding="host" needs one device for all the rest, for '
            'example device_map="cuda" or {"": 0}.'
        )
    return torch.device(places.pop())
