import pytest
import torch
from torch import nn

from loftq.formats import parse_format
from loftq.nn import QuantLinear, dequantize_model_, pack_layer, packed_layers, replace_layer
from packed_folder import quantize


class Scaled(nn.Linear):
    """A linear layer that computes something else."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return 2 * super().forward(x)


class Renamed(nn.Linear):
    """A linear layer by another name."""


def model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(64, 32, bias=False), nn.ReLU(), Renamed(32, 16), Scaled(16, 16))


def test_packing_keeps_the_bias_and_rounds_the_weight():
    net = model()
    packed = {path: quantize(net.get_submodule(path).weight.data) for path in ("0", "2")}
    bias = net[2].bias
    for path, weight in packed.items():
        pack_layer(net, path, weight)
    assert list(packed_layers(net)) == ["0", "2"]
    assert net[2].bias is bias
    assert net[0].path == "0"
    assert dequantize_model_(net) == ["0", "2"]
    assert torch.equal(net[0].weight, packed["0"].dequantize())


@pytest.mark.parametrize(
    ("path", "shape", "message"),
    [
        ("7", None, "7: the model has no such module"),
        ("1", None, "1: found a ReLU, expected Linear"),
        ("3", None, "3: found a Scaled, expected Linear"),
        ("0", (32, 60), r"0: the model has a weight of shape \(32, 64\)"),
    ],
)
def test_what_cannot_be_packed_is_named(path: str, shape: tuple[int, int] | None, message: str):
    with pytest.raises(ValueError, match=message):
        replace_layer(model(), path, parse_format("nf4-g32"), shape=shape)


def test_replacing_keeps_device_dtype_and_mode():
    net = model().to("meta", torch.bfloat16).eval()
    layer = replace_layer(net, "0", parse_format("nf4-g32"))
    assert isinstance(layer, QuantLinear)
    assert layer.weight_packed.is_meta
    assert layer.weight.dtype == torch.bfloat16
    assert not layer.training
