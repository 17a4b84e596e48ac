"""Rows of a packed weight on their own are the rows of the whole."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from loftq.nn import QuantLinear
from loftq.ops import panels
from packed_folder import random_quantized

FORMATS = (
    "nf4-g32",
    "int3-g16-dq",
    "sint8-g64-f16",
    "nf2-channel-bf16",
    "uniform4",
    "sint4-g64-f32",
)


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize(("start", "stop"), [(0, 5), (3, 300), (256, 300), (299, 300), (0, 300)])
def test_rows_are_those_of_the_whole_weight(name: str, start: int, stop: int) -> None:
    layer = QuantLinear.from_quantized(random_quantized(300, 75, name))
    assert torch.equal(layer.dequantize_rows(start, stop), layer.dequantize()[start:stop])


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_panels_compute_what_the_whole_does(
    name: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    layer = QuantLinear.from_quantized(random_quantized(600, 37, name), torch.ones(600), dtype)
    x = torch.randn(2, 4, 37, dtype=dtype, requires_grad=True)
    y = layer(x)
    y.float().square().sum().backward()
    whole, x.grad = x.grad, None
    monkeypatch.setitem(panels.PANEL_WEIGHTS, "cpu", 37 * 256)
    assert panels.panel_rows(600, 37, x.device) == 256
    again = layer(x)
    again.float().square().sum().backward()
    tolerance = {torch.float32: 1e-5, torch.bfloat16: 2e-2}[dtype]
    torch.testing.assert_close(again, y, rtol=tolerance, atol=tolerance)
    scale = whole.float().norm()
    assert (x.grad.float() - whole.float()).norm() <= tolerance * scale


def test_a_panelled_product_never_holds_the_whole_weight(monkeypatch: pytest.MonkeyPatch) -> None:
    layer = QuantLinear.from_quantized(random_quantized(1000, 64, "nf4-g64"))
    monkeypatch.setitem(panels.PANEL_WEIGHTS, "cpu", 64 * 256)
    seen: list[int] = []

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            if isinstance(out, torch.Tensor) and out.is_floating_point():
                seen.append(out.numel())
            return out

    x = torch.randn(3, 64, requires_grad=True)
    with Watch():
        layer(x).sum().backward()
    assert max(seen) <= 256 * 64  # a panel; the whole weight has 64,000


def test_a_slice_of_the_weight_dequantizes_its_rows_only(monkeypatch: pytest.MonkeyPatch) -> None:
    layer = QuantLinear.from_quantized(random_quantized(300, 48, "sint8-g64-f16"))
    whole = layer.dequantize()
    monkeypatch.setattr(QuantLinear, "dequantize", lambda *_: pytest.fail("the whole weight"))
    assert torch.equal(layer.weight[256:400], whole[256:])
    assert torch.equal(layer.weight[:-299], whole[:1])
    with pytest.raises(RuntimeError, match="would write into a dequantized copy"):
        layer.weight[0:4].zero_()


@pytest.mark.parametrize("index", [3, (slice(0, 2), 1), slice(0, 9, 2), slice(4, 4)])
def test_other_indices_mean_what_they_mean_on_a_tensor(index: object) -> None:
    layer = QuantLinear.from_quantized(random_quantized(30, 48, "nf4-g32"))
    assert torch.equal(torch.Tensor(layer.weight[index]), layer.dequantize()[index])


def test_rows_of_a_transposed_weight_are_not_mixed_up() -> None:
    from transformers.pytorch_utils import Conv1D

    from loftq.formats import parse_format
    from loftq.integrations.conv1d import QuantConv1D

    layer = QuantConv1D.from_dense(Conv1D(30, 48), parse_format("nf4-g16"))
    layer.fill_(random_quantized(30, 48, "nf4-g16"))
    assert layer.weight[2:7].shape == (5, 30)
    assert isinstance(layer, nn.Module)
