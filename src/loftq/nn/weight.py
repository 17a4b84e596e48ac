"""What `layer.weight` is on a packed layer: a tensor's face without a tensor's memory.

`PackedWeight` knows shape, dtype and device; any arithmetic dequantizes. The result is a
`DequantizedWeight`, an ordinary dense tensor that remembers its layer. So PEFT, which reads a base
weight, adds its correction and stores the sum through `.data`, merges without knowing us, while a
tensor from elsewhere is refused, and so is a write into the temporary, which would be lost.
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

if TYPE_CHECKING:
    from loftq.nn.packed import PackedLayer

_COMPUTED = {getattr(Tensor, name).__get__ for name in ("T", "mT", "H", "mH", "real", "imag")}
"""Attributes that hold values; every other attribute describes the tensor."""
_DESCRIPTIVE = {
    Tensor.size, Tensor.dim, Tensor.ndimension, Tensor.numel, Tensor.nelement, Tensor.stride,
    Tensor.element_size, Tensor.is_floating_point, Tensor.is_complex, Tensor.is_contiguous,
    Tensor.get_device, Tensor.__len__, Tensor.__hash__, torch.is_floating_point,
    torch.is_complex, torch.numel,
}  # fmt: skip
_HARMLESS = {"requires_grad_", "share_memory_", "rename_"}
_MERGES = ("merge", "unmerge")


class PackedWeight(Tensor):
    """Stand-in for the weight of a packed layer; made on each access, owns no storage."""

    # transformers' init functions leave a tensor alone that carries this flag: a packed layer is
    # never uninitialised.
    _is_hf_initialized = True
    layer: PackedLayer

    @staticmethod
    def __new__(cls, layer: PackedLayer) -> PackedWeight:
        return Tensor._make_wrapper_subclass(
            cls, layer.weight_shape, dtype=layer.compute_dtype, device=layer.weight_packed.device
        )

    def __init__(self, layer: PackedLayer) -> None:
        self.layer = layer

    def __repr__(self, **_: Any) -> str:  # type: ignore[override]
        return f"PackedWeight({self.layer.label}, {tuple(self.shape)}, {self.dtype})"

    @property
    def data(self) -> Tensor:
        """The dequantized weight, protected: writes into it raise, since nobody would see them."""
        if not _packed(self.layer):  # merged since this stand-in was made
            return self.layer.weight.data
        return mark(self.layer.dequantize(), self.layer, protected=True)

    @data.setter
    def data(self, value: Tensor) -> None:
        if not _packed(self.layer):
            self.layer.weight.data = value
            return
        label = self.layer.label
        self.layer.become_dense_(_derived(value, self.layer))
        # A merge says itself what it does. Anything else, such as an adapter initialisation that
        # moves part of the weight into the adapter, costs memory unasked.
        caller = sys._getframe(1).f_code.co_name
        if not caller.startswith(_MERGES):
            warnings.warn(
                f"{label}: `{caller}` rewrote the packed weight, so this layer is now "
                f"dense ({value.numel() * value.element_size() / 2**20:.1f} MiB). To keep it "
                "packed, start from the adapter that was made with it (init_adapter/), or use "
                "init_lora_weights=True.",
                stacklevel=2,
            )

    @classmethod
    def __torch_function__(
        cls, func: Callable, types: Any, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        kwargs = kwargs or {}
        getter = getattr(func, "__name__", "") == "__get__"
        if func in _DESCRIPTIVE or (getter and func not in _COMPUTED):
            with torch._C.DisableTorchFunctionSubclass():
                return func(*args, **kwargs)
        if func is Tensor.__getitem__ and (rows := args[0]._rows(args[1])) is not None:
            return rows
        args, kwargs = pytree.tree_map_only(PackedWeight, lambda w: w.data, (args, kwargs))
        return func(*args, **kwargs)

    def _rows(self, index: Any) -> Tensor | None:
        """`weight[start:stop]` without the rest of the weight: losses take a head in such panels.

        None where the index is another one, or the layer is oriented otherwise or dense by now.
        """
        layer = self.layer
        plain = isinstance(index, slice) and index.step in (None, 1) and _packed(layer)
        if not plain or layer.weight_shape != layer.packed_shape:
            return None
        start, stop, _ = index.indices(layer.packed_shape[0])
        if stop <= start:
            return None
        return mark(layer.dequantize_rows(start, stop), layer, protected=True)

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Callable, types: Any, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        args, kwargs = pytree.tree_map_only(
            PackedWeight, lambda w: _plain(w.data), (args, kwargs or {})
        )
        return func(*args, **kwargs)

    def _refuse(self, *_: Any) -> Any:
        raise _lost_write(self.layer, "weight")

    __iadd__ = __isub__ = __imul__ = __itruediv__ = _refuse

    def requires_grad_(self, requires_grad: bool = True) -> PackedWeight:
        """Packed weights are frozen; asking for a gradient raises."""
        if requires_grad:
            raise _lost_write(self.layer, "requires_grad_")
        return self

    @property
    def requires_grad(self) -> bool:
        """False: packed weights are frozen."""
        return False

    @requires_grad.setter
    def requires_grad(self, value: bool) -> None:
        self.requires_grad_(value)


class DequantizedWeight(Tensor):
    """A dense tensor computed from a packed weight; `.data = it` on that weight densifies it."""

    origin: PackedLayer
    protected: bool
    """It is the temporary itself, or a view of it, not a tensor of the caller's own."""

    @classmethod
    def __torch_function__(
        cls, func: Callable, types: Any, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        kwargs = kwargs or {}
        name = getattr(func, "__name__", "")
        if name in ("__deepcopy__", "__reduce_ex__"):  # must not take the layer along
            return func(_plain(args[0]), *args[1:], **kwargs)
        target = args[0] if args else kwargs.get("tensor")
        for written in (target if _writes(name) else None, kwargs.get("out")):
            if isinstance(written, DequantizedWeight) and written.protected:
                raise _lost_write(written.origin, name)
        with torch._C.DisableTorchFunctionSubclass():
            result = func(*args, **kwargs)
        if type(result) is Tensor:
            for source in _sources(args, kwargs):
                view = source.protected and _alias(result, source)
                # Activations and norms computed from a weight are none of our business.
                if view or result.shape in (source.shape, source.shape[::-1]):
                    return mark(result, source.origin, view)
        elif name == "__set__" and isinstance(args[1], DequantizedWeight):
            args[0].protected = args[1].protected  # `.data =` on the temporary gave it new storage
        return result

    # Python's augmented assignment rebinds: `weight.data += delta` ends in the setter above, which
    # takes the sum. As an in-place write it would be refused.
    def __iadd__(self, other: Any) -> Tensor:  # type: ignore[misc]
        return (self + other).to(self.dtype)

    def __isub__(self, other: Any) -> Tensor:  # type: ignore[misc]
        return (self - other).to(self.dtype)

    def __imul__(self, other: Any) -> Tensor:  # type: ignore[misc]
        return (self * other).to(self.dtype)

    def __itruediv__(self, other: Any) -> Tensor:  # type: ignore[misc]
        return (self / other).to(self.dtype)


def mark(tensor: Tensor, origin: PackedLayer, protected: bool) -> DequantizedWeight:
    """The same tensor, remembering the layer it was computed from."""
    marked = tensor.as_subclass(DequantizedWeight)
    marked.origin, marked.protected = origin, protected
    return marked


def _packed(layer: nn.Module) -> bool:
    return getattr(layer, "is_packed", False)


def _plain(tensor: Tensor) -> Tensor:
    with torch._C.DisableTorchFunctionSubclass():
        return tensor.as_subclass(Tensor)


def _derived(value: Tensor, layer: PackedLayer) -> Tensor:
    """`value` as a plain tensor, if it was computed from the weight of `layer`."""
    known = isinstance(value, DequantizedWeight) and value.origin is layer
    if not known or value.protected or tuple(value.shape) != layer.weight_shape:  # type: ignore[attr-defined]
        found = "its own unchanged weight" if known else f"a {tuple(value.shape)} {value.dtype}"
        raise TypeError(
            f"{layer.label}: `.data =` on a packed weight takes only a tensor of shape "
            f"{layer.weight_shape} computed from that weight, as a merge does; found {found}. "
            "To set other values, call layer.dequantize_() first."
        )
    return _plain(value).detach()


def _lost_write(layer: PackedLayer, name: str) -> RuntimeError:
    return RuntimeError(
        f"{layer.label}: `{name}` would write into a dequantized copy of the packed weight and be "
        "lost. Use `layer.weight.data += delta` to merge, or layer.dequantize_() to make the layer "
        "dense before changing it."
    )


def _writes(name: str) -> bool:
    in_place = name.endswith("_") and not name.endswith("__") and name not in _HARMLESS
    return in_place or name == "__setitem__"


def _sources(args: tuple, kwargs: dict) -> Iterator[DequantizedWeight]:
    return (t for t in pytree.tree_leaves((args, kwargs)) if isinstance(t, DequantizedWeight))


def _alias(a: Tensor, b: Tensor) -> bool:
    with torch._C.DisableTorchFunctionSubclass():
        return a.untyped_storage()._cdata == b.untyped_storage()._cdata
