import pytest
import torch

from loftq.formats import parse_format
from loftq.ops import dequantize
from loftq.ops.reference import view_bytes
from loftq.ops.schema import quant_linear, quant_linear_backward, quant_linear_lora
from packed_folder import random_quantized

FORMATS = ["nf4-g32", "nf3-g16-f32", "int3-g32", "sint2-channel-bf16", "uniform2"]


def arguments(name: str) -> tuple[list, tuple]:
    packed, spec = random_quantized(24, 50, name), parse_format(name)
    tensors = [packed.weight_packed, packed.weight_scale, packed.weight_zero, packed.weight_nested]
    layout = (spec.bits, spec.group_size, spec.scale_coding, spec.levels, spec.default_zero)
    return tensors, layout


@pytest.mark.parametrize("name", FORMATS)
def test_operators_pass_opcheck(name: str, device: torch.device):
    tensors, layout = arguments(name)
    tensors = [None if t is None else t.to(device) for t in tensors]
    x = torch.randn(3, 50, device=device, requires_grad=True)
    torch.library.opcheck(dequantize, (*tensors, 50, *layout, torch.float32))
    torch.library.opcheck(quant_linear, (x, *tensors, *layout))
    adapter = (torch.randn(2, 50, device=device), torch.randn(24, 2, device=device), 0.5)
    torch.library.opcheck(quant_linear_lora, (x.detach(), *tensors, *layout, *adapter))
    torch.library.opcheck(
        quant_linear_backward, (torch.randn(3, 24, device=device), *tensors, 50, *layout)
    )


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["nf4", "int3", "sint2-f16"])
def test_operators_pass_opcheck_on_the_few_token_path(name: str, device: torch.device):
    packed, spec = random_quantized(24, 128, name), parse_format(name)
    stored = (packed.weight_packed, packed.weight_scale, packed.weight_zero, packed.weight_nested)
    tensors = [None if t is None else t.to(device) for t in stored]
    layout = (spec.bits, spec.group_size, spec.scale_coding, spec.levels, spec.default_zero)
    x = torch.randn(3, 128, device=device, dtype=torch.bfloat16)
    adapter = (torch.randn(2, 128, device=device), torch.randn(24, 2, device=device), 0.5)
    torch.library.opcheck(quant_linear, (x, *tensors, *layout, True))
    torch.library.opcheck(quant_linear_lora, (x, *tensors, *layout, *adapter))


def test_bytes_at_an_odd_place_of_a_file_are_read():
    numbers = torch.tensor([1.5, -2.0, 3.25])
    storage = torch.zeros(13, dtype=torch.uint8)
    storage[1:] = numbers.view(torch.uint8)
    assert torch.equal(view_bytes(storage[1:], torch.float32), numbers)
