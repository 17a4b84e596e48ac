"""Layers that turn their inputs: the values and gradients of the dense layer they stand for."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch
from transformers.pytorch_utils import Conv1D

from loftq.formats import parse_format
from loftq.integrations.conv1d import QuantConv1D
from loftq.integrations.embedding import QuantEmbedding
from loftq.nn import QuantLinear
from loftq.ops import hadamard
from packed_folder import random_quantized
from tolerances import FLOAT64_SOLVE

FORMATS = ["nf2-g64-dq-h64", "int3-g32-f16-h32", "nf4-channel-f32-h16", "sint4-g64-bf16-h64"]
ROWS, COLUMNS = 37, 192


def layer(name: str = FORMATS[0], *, bias: bool = True) -> QuantLinear:
    torch.manual_seed(1)
    packed = random_quantized(ROWS, COLUMNS, name)
    return QuantLinear.from_quantized(packed, torch.randn(ROWS) if bias else None)


@pytest.mark.parametrize("name", FORMATS)
def test_outputs_and_gradients_equal_the_dense_layer_in_float64(name: str) -> None:
    quant = layer(name).double()
    stored, plain = quant.quantized(), parse_format(name.rpartition("-")[0])
    values = replace(stored, spec=plain).dequantize()  # W R, which float32 holds exactly
    W = hadamard(values.double(), stored.spec.rotation, True)
    x = torch.randn(2, 3, COLUMNS, dtype=torch.float64, requires_grad=True)
    y, wanted = quant(x), torch.nn.functional.linear(x, W, quant.bias)
    torch.testing.assert_close(y, wanted, rtol=FLOAT64_SOLVE, atol=FLOAT64_SOLVE)
    weights = torch.randn_like(y)
    (grad,) = torch.autograd.grad((y * weights).sum(), x)
    (grad_wanted,) = torch.autograd.grad((wanted * weights).sum(), x)
    torch.testing.assert_close(grad, grad_wanted, rtol=FLOAT64_SOLVE, atol=FLOAT64_SOLVE)
    assert (quant.dequantize() - W).abs().max() < 1e-6 * W.abs().max()


def test_rows_of_the_weight_are_rows_of_the_whole() -> None:
    quant = layer(bias=False)
    whole = quant.dequantize()
    for start, stop in ((0, 5), (7, 8), (0, ROWS)):
        torch.testing.assert_close(quant.dequantize_rows(start, stop), whole[start:stop])
        torch.testing.assert_close(
            torch.as_tensor(quant.weight[start:stop]) + 0, whole[start:stop], check_stride=False
        )


def test_low_precision_loses_no_more_than_one_rounding_of_the_weight() -> None:
    quant, x = layer(bias=False), torch.randn(8, COLUMNS)
    wanted = x @ quant.dequantize().T
    found = copy.deepcopy(quant).bfloat16()(x.bfloat16()).float()
    dense = (x.bfloat16() @ quant.dequantize(torch.bfloat16).T).float()
    lost, lost_dense = ((y - wanted).norm() / wanted.norm() for y in (found, dense))
    assert lost < 2 * lost_dense


def test_a_compiled_layer_turns_its_inputs_too() -> None:
    quant, x = layer(), torch.randn(3, COLUMNS)
    compiled = torch.compile(quant, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), quant(x))


def test_conv1d_turns_its_inputs() -> None:
    stock = Conv1D(ROWS, COLUMNS)
    quant = QuantConv1D.from_dense(stock, parse_format(FORMATS[0]))
    quant.fill_(random_quantized(ROWS, COLUMNS, FORMATS[0]))
    dense, x = copy.deepcopy(quant).dequantize_(), torch.randn(4, COLUMNS)
    torch.testing.assert_close(quant(x), dense(x), rtol=1e-5, atol=1e-4)


def test_a_table_and_a_width_that_no_block_fills_are_refused() -> None:
    with pytest.raises(ValueError, match="an embedding has none"):
        QuantEmbedding.from_dense(torch.nn.Embedding(10, 64), parse_format("sint8-g64-f16-h64"))
    with pytest.raises(ValueError, match="75 columns are not whole blocks of 16"):
        QuantLinear(75, 3, parse_format("nf4-g64-dq-h16"))
