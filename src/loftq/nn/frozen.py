"""Products with a frozen weight in a pass of training: packed, of which no dense copy is kept, or
dense in any dtype, cast where it is used."""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional as F

from loftq.nn.linear import QuantLinear
from loftq.ops import dequantize, quant_linear
from loftq.ops.direct import direct
from loftq.ops.panels import panel_rows
from loftq.ops.schema import quant_linear_backward


def product(x: Tensor, layer: nn.Linear, bias: Tensor | None) -> Tensor:
    """W x + b: (..., in_features) -> (..., out_features) in x's dtype; records no gradient.

    Args:
        x: (..., in_features).
        layer: whose weight is W.
        bias: b in x's dtype, or None.

    Returns:
        A tensor of the caller's own.
    """
    weight = _dense(layer, x)
    if weight is not None:
        return F.linear(x, weight, bias)
    assert isinstance(layer, QuantLinear)
    y: Tensor = direct(quant_linear, x)(x, *_stored(layer), *layer.layout)
    return y if bias is None else y.add_(bias)


def add_gradient(total: Tensor | None, grad: Tensor, layer: nn.Linear) -> Tensor:
    """total + dL/dy W, in place if there is a total: (tokens, in_features) in grad's dtype.

    Args:
        total: of other layers that read the same x; None = nothing yet.
        grad: dL/dy, (tokens, out_features).
        layer: whose weight is W.
    """
    weight = _dense(layer, grad)
    if weight is None:
        assert isinstance(layer, QuantLinear)
        found: Tensor = direct(quant_linear_backward, grad)(
            grad, *_stored(layer), layer.in_features, *layer.layout
        )
        return found if total is None else total.add_(found)
    return grad @ weight if total is None else total.addmm_(grad, weight)


def _dense(layer: nn.Linear, like: Tensor) -> Tensor | None:
    """W in the dtype of `like`; None where it is so large that it is taken by panels."""
    if not isinstance(layer, QuantLinear):
        return layer.weight.to(like.dtype)
    rows, columns = layer.packed_shape
    if panel_rows(rows, columns, like.device) < rows:
        return None
    dense: Tensor = direct(dequantize, like)(*_stored(layer), columns, *layer.layout, like.dtype)
    return dense


def _stored(layer: QuantLinear) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    return layer.weight_packed, layer.weight_scale, layer.weight_zero, layer.weight_nested
