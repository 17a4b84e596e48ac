"""What every packed layer shares: parameters, the weight's face, dtype, the way back to dense."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from loftq.formats import (
    COMPONENTS,
    FormatSpec,
    QuantizedTensor,
    component_shapes,
    decoded_dtype,
    from_stored_basis,
)
from loftq.nn.weight import PackedWeight
from loftq.ops import dequantize
from loftq.ops.panels import Packed, panels


class PackedLayer(nn.Module):
    """Mixin in front of a stock layer class: its weight is held as packed bytes.

    The bytes are Parameters without gradient, all uint8, so that DDP broadcasts nothing, FSDP2
    shards them and a dtype cast leaves them alone. A bias stays an ordinary parameter.
    """

    is_packed: ClassVar[bool] = True
    dense_class: ClassVar[type[nn.Module]]
    """What the layer becomes when it is made dense."""
    weight_packed: Tensor
    weight_scale: Tensor
    weight_zero: Tensor | None
    weight_nested: Tensor | None
    # Never uninitialised, whatever a model's _init_weights thinks (see PackedWeight too).
    _is_hf_initialized = True

    def _pack(
        self,
        spec: FormatSpec,
        shape: tuple[int, int],
        dtype: torch.dtype | None,
        device: torch.device | str | None,
    ) -> None:
        """Register the packed parameters, zeroed; `shape` is (out_features, in_features)."""
        self.spec, self.packed_shape = spec, shape
        self.compute_dtype = dtype or torch.get_default_dtype()
        self.path = ""
        levels = tuple(spec.levels)
        self.layout = (spec.bits, spec.group_size, spec.scale_coding, levels, spec.default_zero)
        shapes = component_shapes(spec, shape)
        for name in COMPONENTS:
            parameter = None
            if name in shapes:
                zeros = torch.zeros(shapes[name], dtype=torch.uint8, device=device)
                parameter = nn.Parameter(zeros, requires_grad=False)
            self.register_parameter(name, parameter)

    @classmethod
    def from_dense(cls, module: nn.Module, spec: FormatSpec) -> PackedLayer:
        """An unfilled packed layer in the place of `module`; shares its bias, dtype and device."""
        raise NotImplementedError

    @property
    def label(self) -> str:
        """How messages name the layer: its path in the model if known, and its class."""
        own = f"{type(self).__name__}{self.packed_shape}"
        return f"{self.path} ({own})" if self.path else own

    @property
    def weight_shape(self) -> tuple[int, int]:
        """Shape of `weight`: (out_features, in_features), unless the layer stores it otherwise."""
        return self.packed_shape

    @property
    def weight(self) -> Tensor:
        """A tensor's face of the packed weight; any arithmetic on it dequantizes."""
        return self.dequantize() if torch.compiler.is_compiling() else PackedWeight(self)

    @weight.setter
    def weight(self, value: object) -> None:
        raise self._not_assignable()

    def register_parameter(self, name: str, param: nn.Parameter | None) -> None:
        """As nn.Module, but a dense `weight` beside the packed one is refused."""
        if name == "weight":
            raise self._not_assignable()
        super().register_parameter(name, param)

    def _not_assignable(self) -> TypeError:
        return TypeError(
            f"{self.label}: the weight is packed and cannot be assigned. Call dequantize_() to "
            "make the layer dense, or fill_(QuantizedTensor) to set other packed values."
        )

    def components(self) -> dict[str, nn.Parameter]:
        """The packed parameters that exist, by name."""
        found = {name: self._parameters[name] for name in COMPONENTS}
        return {name: tensor for name, tensor in found.items() if tensor is not None}

    def fill_(self, quantized: QuantizedTensor) -> PackedLayer:
        """Take over packed values; format and shape must be the layer's."""
        if (quantized.spec, quantized.shape) != (self.spec, self.packed_shape):
            raise ValueError(
                f"{self.label}: found {quantized.spec} of shape {quantized.shape}, expected "
                f"{self.spec} of shape {self.packed_shape}."
            )
        for name, tensor in quantized.to_state_dict().items():
            self._parameters[name] = nn.Parameter(tensor, requires_grad=False)
        return self

    def quantized(self) -> QuantizedTensor:
        """The packed weight; shares memory with the parameters."""
        tensors = {k: p.detach().to(torch.uint8) for k, p in self.components().items()}
        return QuantizedTensor.from_state_dict(self.spec, self.packed_shape, tensors)

    def dequantize(self, dtype: torch.dtype | None = None) -> Tensor:
        """The dense weight in the orientation of `weight`; default dtype: the layer's."""
        dtype = dtype or self.compute_dtype
        stored = dequantize(
            self.weight_packed, self.weight_scale, self.weight_zero, self.weight_nested,
            self.packed_shape[1], *self.layout, decoded_dtype(self.spec, dtype),
        )  # fmt: skip
        return from_stored_basis(stored, self.spec).to(dtype)

    def dequantize_rows(self, start: int, stop: int, dtype: torch.dtype | None = None) -> Tensor:
        """Rows start .. stop - 1 of the packed weight, dense; scratch memory is that of a panel."""
        dtype = dtype or self.compute_dtype
        packed = Packed(
            self.weight_packed, self.weight_scale, self.weight_zero, self.weight_nested,
            self.packed_shape[1], *self.layout,
        )  # fmt: skip
        decoded = decoded_dtype(self.spec, dtype)
        found = list(panels(packed, start, stop))
        if len(found) == 1:  # a second copy of it would be the largest tensor of the loss
            stored = dequantize(*found[0][1].arguments, decoded)
            return from_stored_basis(stored, self.spec).to(dtype)
        dense = torch.empty(
            (stop - start, packed.in_features), dtype=dtype, device=packed.codes.device
        )
        for first, panel in found:
            part = dense[first - start : first - start + panel.codes.shape[0]]
            part.copy_(from_stored_basis(dequantize(*panel.arguments, decoded), self.spec))
        return dense

    def dequantize_(self, dtype: torch.dtype | None = None) -> nn.Module:
        """Become a plain dense layer, in place. Returns self."""
        self.become_dense_(self.dequantize(dtype))
        return self

    def become_dense_(self, weight: Tensor) -> None:
        """Drop the packed parameters and hold `weight` instead; the class changes with it."""
        for name in COMPONENTS:
            del self._parameters[name]
        for name in ("spec", "layout", "compute_dtype", "packed_shape"):
            del self.__dict__[name]
        others = dict(self._parameters)
        self._parameters.clear()
        self.__class__ = self.dense_class  # type: ignore[assignment]
        dense = nn.Parameter(weight, requires_grad=False)
        dense._is_hf_initialized = True  # type: ignore[attr-defined]
        self.register_parameter("weight", dense)
        self._parameters.update(others)

    def reset_parameters(self) -> None:
        """Refused: there is no random initialisation of packed bytes."""
        raise RuntimeError(
            f"{self.label}: a packed layer cannot be initialised. Load it with from_pretrained, "
            "or call dequantize_() first."
        )

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> PackedLayer:
        # Casts skip the bytes; an empty tensor of the layer's dtype goes along to learn of them.
        probe = torch.empty(0, dtype=self.compute_dtype, device=self.weight_packed.device)
        dtype = fn(probe).dtype
        super()._apply(fn, recurse)
        if self.is_packed and dtype.is_floating_point:
            self.compute_dtype = dtype
        return self

    def extra_repr(self) -> str:
        """Geometry, bias and format."""
        rows, columns = self.packed_shape
        bias = getattr(self, "bias", None) is not None
        return f"in_features={columns}, out_features={rows}, bias={bias}, format={self.spec}"


def autocast(x: Tensor) -> Tensor:
    """`x` in the dtype that autocast, if on, would hand to a linear layer."""
    device = x.device.type
    eligible = x.is_floating_point() and x.dtype is not torch.float64
    if not eligible or not torch.is_autocast_enabled(device):
        return x
    return x.to(torch.get_autocast_dtype(device))


def no_gradient_comes(module: nn.Module, x: Tensor) -> bool:
    """Whether a product of x may take a path that only inference takes (ops.quant_linear).

    Not in training mode: checkpointing may run the first forward without gradients and the second
    with them, and both have to give the same values.
    """
    return not (module.training or (torch.is_grad_enabled() and x.requires_grad))


def no_gradient(tensor: Tensor | None) -> Any:
    """A frozen Parameter of `tensor`, or None."""
    return None if tensor is None else nn.Parameter(tensor.detach(), requires_grad=False)
