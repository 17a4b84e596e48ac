"""One quantized weight: the packed tensors that are stored, and the values they stand for."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from loftq.formats.basis import decoded_dtype, from_stored_basis
from loftq.formats.packing import pack_codes
from loftq.formats.scales import encode_scales
from loftq.formats.spec import FormatSpec, component_shapes
from loftq.ops import dequantize
from loftq.ops.reference import PER_TENSOR

COMPONENTS = ("weight_packed", "weight_scale", "weight_zero", "weight_nested")


@dataclass(frozen=True, kw_only=True)
class QuantizedTensor:
    """A weight (out_features, in_features) in its stored form; every component is uint8."""

    spec: FormatSpec
    shape: tuple[int, int]
    weight_packed: Tensor
    weight_scale: Tensor
    weight_zero: Tensor | None = None
    weight_nested: Tensor | None = None

    def __post_init__(self) -> None:
        found = {name: tuple(tensor.shape) for name, tensor in self.to_state_dict().items()}
        wanted = component_shapes(self.spec, self.shape)
        if found != wanted:
            raise ValueError(
                f"{self.spec} of shape {self.shape}: packed tensors {found}, expected {wanted}."
            )

    @classmethod
    def from_codes(
        cls, spec: FormatSpec, codes: Tensor, scales: Tensor, zeros: Tensor | None
    ) -> QuantizedTensor:
        """Pack codes (out, in) uint8 with fitted scales and zeros (out, groups) float32."""
        scale, nested = encode_scales(scales, spec.scale_coding)
        zero = None
        if zeros is not None and spec.group_size == PER_TENSOR:
            zero = zeros.contiguous().view(torch.uint8)
        elif zeros is not None:
            zero = pack_codes(zeros.to(torch.uint8), spec.bits)
        return cls(
            spec=spec,
            shape=(codes.shape[0], codes.shape[1]),
            weight_packed=pack_codes(codes, spec.bits),
            weight_scale=scale,
            weight_zero=zero,
            weight_nested=nested,
        )

    @classmethod
    def from_state_dict(
        cls, spec: FormatSpec, shape: tuple[int, int], tensors: Mapping[str, Tensor]
    ) -> QuantizedTensor:
        """From the components by name; shapes are checked against the format."""
        return cls(spec=spec, shape=shape, **{k: tensors[k] for k in COMPONENTS if k in tensors})

    def to_state_dict(self) -> dict[str, Tensor]:
        """The components that exist, by name."""
        found = {name: getattr(self, name) for name in COMPONENTS}
        return {name: tensor for name, tensor in found.items() if tensor is not None}

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The weight (out_features, in_features) that the bytes stand for."""
        stored = dequantize(
            self.weight_packed, self.weight_scale, self.weight_zero, self.weight_nested,
            self.shape[1], self.spec.bits, self.spec.group_size, self.spec.scale_coding,
            self.spec.levels, self.spec.default_zero, decoded_dtype(self.spec, dtype),
        )  # fmt: skip
        return from_stored_basis(stored, self.spec).to(dtype)

    @property
    def nbytes(self) -> int:
        """Stored bytes."""
        return sum(tensor.numel() for tensor in self.to_state_dict().values())
