"""A linear layer whose weight stays packed: forward and backward read the bytes."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from loftq.formats import FormatSpec, QuantizedTensor, to_stored_basis
from loftq.nn.packed import PackedLayer, autocast, no_gradient, no_gradient_comes
from loftq.ops import quant_linear


class QuantLinear(PackedLayer, nn.Linear):
    """nn.Linear with a packed, frozen weight.

    Computes x @ W^T + bias in the dtype of x (of autocast, if on), with W dequantized to that
    dtype. Gradients flow to x only; between forward and backward only packed tensors are kept.

    Args:
        in_features: columns of the weight.
        out_features: rows of the weight.
        spec: the format of the packed weight.
        bias: whether a bias is added.
        dtype: of `weight` and the bias; default torch's.
        device: of the parameters.
    """

    dense_class = nn.Linear

    def __init__(
        self,
        in_features: int,
        out_features: int,
        spec: FormatSpec,
        *,
        bias: bool = True,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        nn.Module.__init__(self)
        self.in_features, self.out_features = in_features, out_features
        self._pack(spec, (out_features, in_features), dtype, device)
        zeros = torch.zeros(out_features, dtype=self.compute_dtype, device=device) if bias else None
        self.register_parameter("bias", no_gradient(zeros))

    @classmethod
    def from_quantized(
        cls,
        quantized: QuantizedTensor,
        bias: Tensor | None = None,
        dtype: torch.dtype | None = None,
    ) -> QuantLinear:
        """A layer around packed values (shared, not copied) on their device."""
        rows, columns = quantized.shape
        layer = cls(columns, rows, quantized.spec, bias=False, dtype=dtype, device="meta")
        layer.bias = no_gradient(bias if bias is None or dtype is None else bias.to(dtype))
        layer.fill_(quantized)
        return layer

    @classmethod
    def from_dense(cls, module: nn.Module, spec: FormatSpec) -> QuantLinear:
        """An unfilled layer in the place of an nn.Linear; shares its bias, dtype and device."""
        assert isinstance(module, nn.Linear)
        weight = module.weight
        layer = cls(
            module.in_features, module.out_features, spec,
            bias=False, dtype=weight.dtype, device=weight.device,
        )  # fmt: skip
        layer.bias = module.bias
        return layer.train(module.training)

    def forward(self, x: Tensor) -> Tensor:
        """(..., in_features) -> (..., out_features)."""
        x = autocast(x)
        if x.shape[-1] != self.in_features:
            raise ValueError(
                f"{self.label}: input of shape {tuple(x.shape)}, expected (..., {self.in_features})"
            )
        y = quant_linear(
            to_stored_basis(x, self.spec), self.weight_packed, self.weight_scale, self.weight_zero,
            self.weight_nested, *self.layout, no_gradient_comes(self, x),
        )  # fmt: skip
        return y if self.bias is None else y + self.bias.to(y.dtype)
