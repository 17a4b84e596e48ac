"""GPT-2's Conv1D, a linear layer that stores its weight as (in, out), with a packed weight."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from loftq.formats import FormatSpec, to_stored_basis
from loftq.nn.packed import PackedLayer, autocast, no_gradient, no_gradient_comes
from loftq.ops import quant_linear


class QuantConv1D(PackedLayer, Conv1D):
    """Conv1D with a packed, frozen weight, packed as (out, in) like every other layer's.

    `weight` is oriented (in, out), as PEFT expects of a Conv1D (fan_in_fan_out).

    Args:
        nf: output features.
        nx: input features.
        spec: the format of the packed weight.
        dtype: of `weight` and the bias; default torch's.
        device: of the parameters.
    """

    dense_class = Conv1D

    def __init__(
        self,
        nf: int,
        nx: int,
        spec: FormatSpec,
        *,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        nn.Module.__init__(self)
        self.nf, self.nx = nf, nx
        self._pack(spec, (nf, nx), dtype, device)
        self.bias = no_gradient(torch.zeros(nf, dtype=self.compute_dtype, device=device))

    @classmethod
    def from_dense(cls, module: nn.Module, spec: FormatSpec) -> QuantConv1D:
        """An unfilled layer in the place of a Conv1D; shares its bias, dtype and device."""
        assert isinstance(module, Conv1D)
        weight = module.weight
        layer = cls(module.nf, module.nx, spec, dtype=weight.dtype, device=weight.device)
        layer.bias = module.bias
        return layer.train(module.training)

    @property
    def weight_shape(self) -> tuple[int, int]:
        return self.packed_shape[::-1]

    def dequantize(self, dtype: torch.dtype | None = None) -> Tensor:
        """The dense weight (in, out)."""
        return super().dequantize(dtype).T.contiguous()

    def forward(self, x: Tensor) -> Tensor:
        """(..., nx) -> (..., nf)."""
        x = autocast(x)
        if x.shape[-1] != self.nx:
            raise ValueError(
                f"{self.label}: input of shape {tuple(x.shape)}, expected (..., {self.nx})"
            )
        y = quant_linear(
            to_stored_basis(x, self.spec), self.weight_packed, self.weight_scale, self.weight_zero,
            self.weight_nested, *self.layout, no_gradient_comes(self, x),
        )  # fmt: skip
        return y + self.bias.to(y.dtype)

    def __repr__(self) -> str:
        return nn.Module.__repr__(self)
