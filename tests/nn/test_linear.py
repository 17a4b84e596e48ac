import copy
import pickle

import pytest
import torch
from torch import nn

from loftq.nn import QuantLinear
from packed_folder import random_quantized
from tolerances import FLOAT32_ROUNDING, FLOAT64_SOLVE

FORMATS = ["nf4-g64", "nf3-g32", "nf2-g16-f16", "int3-g32", "int2-channel-f32", "sint4-g32-bf16",
           "iq4nl", "uniform2"]  # fmt: skip


def layer(
    name: str = "nf4-g32", rows: int = 37, columns: int = 75, bias: bool = True
) -> QuantLinear:
    torch.manual_seed(1)
    packed = random_quantized(rows, columns, name)
    return QuantLinear.from_quantized(packed, torch.randn(rows) if bias else None)


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("bias", [True, False])
def test_outputs_and_gradients_equal_the_dense_layer_in_float64(name: str, bias: bool):
    quant = layer(name, bias=bias).double()
    dense = copy.deepcopy(quant).dequantize_()
    x = torch.randn(2, 3, 75, dtype=torch.float64, requires_grad=True)
    y, wanted = quant(x), dense(x)
    torch.testing.assert_close(y, wanted, rtol=FLOAT64_SOLVE, atol=FLOAT64_SOLVE)
    weights = torch.randn_like(y)
    (grad,) = torch.autograd.grad((y * weights).sum(), x)
    (grad_wanted,) = torch.autograd.grad((wanted * weights).sum(), x)
    torch.testing.assert_close(grad, grad_wanted, rtol=FLOAT64_SOLVE, atol=FLOAT64_SOLVE)


def test_outputs_and_gradients_equal_the_dense_layer_in_float32():
    quant = layer()
    dense = copy.deepcopy(quant).dequantize_()
    x = torch.randn(5, 75, requires_grad=True)
    y, wanted = quant(x), dense(x)
    assert (y - wanted).abs().max() <= FLOAT32_ROUNDING * wanted.abs().max()
    (grad,) = torch.autograd.grad(y.square().sum(), x)
    (grad_wanted,) = torch.autograd.grad(dense(x).square().sum(), x)
    assert (grad - grad_wanted).abs().max() <= 4 * FLOAT32_ROUNDING * grad_wanted.abs().max()


def test_only_packed_bytes_and_the_bias_are_state():
    quant = layer()
    assert list(quant.state_dict()) == ["weight_packed", "weight_scale", "weight_nested", "bias"]
    assert not list(quant.buffers())
    for name, parameter in quant.named_parameters():
        assert not parameter.requires_grad
        assert parameter.dtype == (torch.float32 if name == "bias" else torch.uint8)


def test_dense_weights_are_not_saved_for_backward():
    quant, saved = layer(bias=False), []
    x = torch.randn(5, 75, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        quant(x)
    assert saved
    assert {t.dtype for t in saved} == {torch.uint8}


def test_casts_move_the_dtype_and_leave_the_bytes():
    quant = layer()
    before = {k: v.clone() for k, v in quant.quantized().to_state_dict().items()}
    for dtype in (torch.bfloat16, torch.float16, torch.float64, torch.float32):
        quant.to(dtype)
        assert quant.weight.dtype == quant.bias.dtype == dtype
        assert quant(torch.randn(2, 75, dtype=dtype)).dtype == dtype
    nn.Sequential(quant).half()
    assert quant.weight.dtype == torch.float16
    for name, tensor in quant.quantized().to_state_dict().items():
        assert torch.equal(tensor, before[name])


def test_bytes_cast_by_mixed_precision_are_read_back():
    quant = layer(bias=False)
    wanted = quant(torch.ones(1, 75))
    for name, parameter in quant.components().items():
        cast = nn.Parameter(parameter.to(torch.bfloat16), requires_grad=False)
        quant._parameters[name] = cast
    assert torch.equal(quant(torch.ones(1, 75)), wanted)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_computes_in_its_dtype_as_nn_linear_does(dtype: torch.dtype):
    quant = layer(bias=False)
    dense = copy.deepcopy(quant).dequantize_()
    x = torch.randn(4, 75, requires_grad=True)
    with torch.autocast("cpu", dtype):
        y, wanted = quant(x), dense(x)
        double = quant(x.double())
    assert y.dtype == wanted.dtype == dtype
    assert double.dtype == torch.float64
    assert torch.equal(y, wanted)
    with torch.autocast("cpu", dtype):
        assert layer(bias=True)(x).dtype == dtype
    y.float().sum().backward()
    assert x.grad.dtype == torch.float32


def test_copies_and_pickles_compute_the_same():
    quant, x = layer(), torch.randn(2, 75)
    quant.path = "model.up_proj"
    for twin in (copy.deepcopy(quant), pickle.loads(pickle.dumps(quant))):
        assert torch.equal(twin(x), quant(x))
        assert twin.label == quant.label
    assert quant.share_memory().weight_packed.is_shared()
    assert copy.deepcopy(quant.weight).shape == quant.weight.shape


def test_state_dict_fills_an_empty_layer():
    quant = layer("int3-g32")
    empty = QuantLinear(75, 37, quant.spec, dtype=torch.float32)
    empty.load_state_dict(quant.state_dict())
    x = torch.randn(2, 75)
    assert torch.equal(empty(x), quant(x))
    with pytest.raises(RuntimeError, match=r'Unexpected key.*"weight"'):
        empty.load_state_dict(nn.Linear(75, 37).state_dict())


def test_meta_layer_materializes():
    quant = layer()
    empty = QuantLinear(75, 37, quant.spec, device="meta")
    assert empty.weight.is_meta
    empty.to_empty(device="cpu").load_state_dict(quant.state_dict())
    assert torch.equal(empty.weight + 0, quant.weight + 0)


def test_wrong_width_is_refused_by_name():
    quant = layer()
    quant.path = "model.up_proj"
    with pytest.raises(ValueError, match=r"model.up_proj .*\(2, 74\), expected \(\.\.\., 75\)"):
        quant(torch.randn(2, 74))


def test_other_packed_values_need_the_same_format():
    with pytest.raises(ValueError, match=r"found nf2-g32-dq .* expected nf4-g32-dq"):
        layer().fill_(random_quantized(37, 75, "nf2-g32"))


def test_dequantize_makes_a_plain_linear():
    quant = layer()
    values = quant.dequantize()
    dense = quant.dequantize_()
    assert type(dense) is nn.Linear
    assert torch.equal(dense.weight, values)
    assert list(dense.state_dict()) == ["weight", "bias"]
    assert layer(bias=False).dequantize_().bias is None


def test_compiled_without_graph_breaks():
    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up = layer("nf3-g32", 64, 48)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            if x.dtype != self.up.weight.dtype:  # as T5 asks
                x = x.to(self.up.weight.dtype)
            return torch.nn.functional.silu(self.up(x))

    block = Block()
    compiled = torch.compile(block, fullgraph=True, backend="inductor")
    x = torch.randn(4, 48, requires_grad=True)
    y = compiled(x)
    torch.testing.assert_close(y, block(x))
    (grad,) = torch.autograd.grad(y.sum(), x)
    (wanted,) = torch.autograd.grad(block(x).sum(), x)
    torch.testing.assert_close(grad, wanted)
    with torch.autocast("cpu", torch.bfloat16):
        assert compiled(x).dtype == torch.bfloat16


@pytest.fixture
def asked(monkeypatch):
    """The products that asked for the path of inference, which rounds otherwise than training's."""
    calls = []
    monkeypatch.setattr("loftq.ops.schema.small_linear_kernel", lambda *_: calls.append(1))
    return calls


def test_a_checkpointed_forward_takes_the_path_of_training_both_times(asked):
    """Reentrant checkpointing runs the first forward without gradients."""
    from torch.utils.checkpoint import checkpoint

    quant = layer()
    x = torch.randn(5, 75, requires_grad=True)
    checkpoint(quant, x, use_reentrant=True).sum().backward()
    assert x.grad is not None
    assert not asked


def test_a_compiled_layer_takes_the_path_of_training_when_a_gradient_comes(asked):
    quant = torch.compile(layer().eval(), backend="aot_eager", fullgraph=True)
    quant(torch.randn(5, 75, requires_grad=True)).sum().backward()
    assert not asked
    with torch.no_grad():
        quant(torch.randn(5, 75))
    assert asked


def test_inference_asks_for_its_own_path(asked):
    quant = layer().eval()
    quant(torch.randn(5, 75))
    assert asked
