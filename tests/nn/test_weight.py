import warnings
from collections.abc import Callable

import pytest
import torch
from torch import nn

from loftq.nn import QuantLinear
from loftq.nn.weight import DequantizedWeight
from packed_folder import random_quantized


@pytest.fixture
def layer() -> QuantLinear:
    made = QuantLinear.from_quantized(random_quantized(40, 64, "nf4-g32"), torch.zeros(40))
    made.path = "model.up_proj"
    return made


def merge(layer: QuantLinear, delta: torch.Tensor) -> None:
    layer.weight.data += delta


def test_weight_describes_itself_without_dequantizing(layer: QuantLinear, monkeypatch):
    monkeypatch.setattr(QuantLinear, "dequantize", None)
    weight = layer.weight
    assert weight.shape == (40, 64)
    assert (weight.dtype, weight.device.type) == (torch.float32, "cpu")
    assert (weight.dim(), weight.numel(), len(weight)) == (2, 40 * 64, 40)
    assert weight.is_floating_point()
    assert not weight.requires_grad
    assert "model.up_proj" in repr(weight)


def test_any_arithmetic_dequantizes(layer: QuantLinear):
    values = layer.dequantize()
    x = torch.randn(3, 64)
    assert torch.equal(layer.weight + 1, values + 1)
    assert torch.equal(layer.weight.T, values.T)
    assert torch.equal(layer.weight[3], values[3])
    assert torch.equal(torch.linalg.norm(layer.weight, dim=1), torch.linalg.norm(values, dim=1))
    activations = nn.functional.linear(x, layer.weight)
    assert type(activations) is torch.Tensor


WRITES: list[Callable[[QuantLinear], object]] = [
    lambda l: l.weight.normal_(),
    lambda l: nn.init.normal_(l.weight),
    lambda l: nn.init.zeros_(l.weight),
    lambda l: nn.init.xavier_uniform_(l.weight),
    lambda l: nn.init.kaiming_uniform_(l.weight),
    lambda l: nn.init.orthogonal_(l.weight),
    lambda l: l.weight.data.normal_(),
    lambda l: l.weight.data.add_(1),
    lambda l: l.weight.data.copy_(torch.zeros(40, 64)),
    lambda l: l.weight.data.T.zero_(),
    lambda l: l.weight.data[0].zero_(),
    lambda l: l.weight.data.__setitem__(0, 1.0),
    lambda l: torch.add(torch.zeros(40, 64), 1, out=l.weight.data),
    lambda l: l.weight.__iadd__(1),
    lambda l: l.reset_parameters(),
    lambda l: l.weight.requires_grad_(),
    lambda l: setattr(l.weight, "requires_grad", True),
]


@pytest.mark.parametrize("write", WRITES)
def test_a_write_that_would_be_lost_raises_naming_the_layer(layer: QuantLinear, write):
    before = layer.dequantize()
    with pytest.raises(RuntimeError, match=r"model.up_proj.*dequantize_"):
        write(layer)
    assert torch.equal(layer.dequantize(), before)


ASSIGNMENTS: list[Callable[[QuantLinear], object]] = [
    lambda l: setattr(l.weight, "data", torch.zeros(40, 64)),
    lambda l: setattr(l.weight, "data", l.weight.data),
    lambda l: setattr(l.weight, "data", l.weight.data[:20] + 1),
    lambda l: setattr(l, "weight", torch.zeros(40, 64)),
    lambda l: setattr(l, "weight", nn.Parameter(torch.zeros(40, 64))),
    lambda l: l.register_parameter("weight", None),
]


@pytest.mark.parametrize("assign", ASSIGNMENTS)
def test_a_foreign_weight_is_refused_naming_the_layer(layer: QuantLinear, assign):
    with pytest.raises(TypeError, match=r"model.up_proj"):
        assign(layer)
    assert isinstance(layer, QuantLinear)


def test_the_weight_of_another_layer_is_refused(layer: QuantLinear):
    other = QuantLinear.from_quantized(random_quantized(40, 64, "nf4-g32"))
    with pytest.raises(TypeError, match=r"model\.up_proj"):
        layer.weight.data = other.weight.data + 1


def test_adding_to_data_merges_and_densifies_quietly(layer: QuantLinear):
    delta, values = torch.randn(40, 64), layer.dequantize()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        merge(layer, delta)
    assert type(layer) is nn.Linear
    assert type(layer.weight) is nn.Parameter
    assert torch.equal(layer.weight, values + delta)
    layer.weight.data -= delta  # unmerge: an ordinary dense layer from here on


def test_a_stand_in_made_before_the_merge_sees_the_dense_weight(layer: QuantLinear):
    stand_in, delta = layer.weight, torch.randn(40, 64)
    merge(layer, delta)
    stand_in.data = stand_in.data - delta
    assert type(stand_in.data) is torch.Tensor
    assert torch.equal(layer.weight, stand_in.data)


def test_a_sum_keeps_the_dtype_of_the_weight(layer: QuantLinear):
    layer.to(torch.bfloat16)
    values, delta = layer.dequantize(), torch.randn(40, 64)
    wanted = values.clone().add_(delta)
    merge(layer, delta)
    assert layer.weight.dtype == torch.bfloat16
    assert torch.equal(layer.weight, wanted)


def test_any_other_rewrite_densifies_with_a_warning(layer: QuantLinear):
    def pissa_init() -> None:
        weight = layer.weight.to(torch.float32)
        layer.weight.data = (weight.data - 0.5).to(weight.dtype)

    with pytest.warns(UserWarning, match=r"model.up_proj.*`pissa_init`.*dense"):
        pissa_init()
    assert type(layer) is nn.Linear


def test_own_copies_may_be_written(layer: QuantLinear):
    copy = layer.weight.data.clone()
    copy.mul_(2)
    assert isinstance(copy, DequantizedWeight)
    assert torch.equal(copy, layer.dequantize() * 2)
