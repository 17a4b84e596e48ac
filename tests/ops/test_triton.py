"""Rounding and dequantization kernels against plain PyTorch, bit for bit: interpreted, or on a GPU.

The interpreter needs its variable before Triton is imported, hence a process of its own.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from loftq.formats import parse_format
from loftq.formats.grids import grid_of
from loftq.ops.columns import LEAST_SCALE
from loftq.ops.dispatch import dequantize_kernel, round_kernel, why_no_dequantize_kernel
from loftq.ops.reference import dequantize_reference
from loftq.rounding import round_to_nearest

FORMATS = (
    "nf4", "nf3", "nf2-g32-f32", "snf2-g16-bf16", "iq4nl", "even3-g128-f16", "int4", "int3-g32-f16",
    "int2-g16-f32", "int8-g256-bf16", "sint4-g32-f16", "sint3-channel-f32", "sint8", "nf2-channel",
)  # fmt: skip
SHAPES = ((1, 16), (5, 37), (3, 63), (33, 256), (2, 4097))


def weights(rows, columns):
    W = torch.randn(1, rows, columns, generator=torch.Generator().manual_seed(rows + columns))
    W[0, 0, :16] = 0  # a group without extent
    return W


def check_dequantize(device, formats=FORMATS, shapes=SHAPES):
    from loftq.ops.triton.dequantize import dequantize

    for name in formats:
        for shape in shapes:
            spec = parse_format(name)
            rounded, _ = round_to_nearest(weights(*shape), spec, fit="absmax")
            q = rounded.pack(0)
            tensors = (q.weight_packed, q.weight_scale, q.weight_zero, q.weight_nested)
            layout = (shape[1], spec.bits, spec.group_size, spec.scale_coding, spec.levels)
            for dtype in (torch.float32, torch.float16):
                rest = (*layout, spec.default_zero, dtype)
                wanted = dequantize_reference(*tensors, *rest)
                found = dequantize(*(None if t is None else t.to(device) for t in tensors), *rest)
                assert torch.equal(found.cpu(), wanted), (name, shape, dtype)
                start, stop = shape[0] // 2, max(1, shape[0] - 1)  # some rows, into a buffer
                out = torch.full((stop - start, shape[1]), torch.nan, dtype=dtype, device=device)
                on_device = (None if t is None else t.to(device) for t in tensors)
                found = dequantize(*on_device, *rest, start=start, out=out)
                assert torch.equal(found.cpu(), wanted[start:stop]), (name, shape, start)


def check_round(device, formats=FORMATS, shapes=SHAPES):
    from loftq.ops.triton.round import round_rows

    for name in formats:
        spec = parse_format(name)
        if not spec.group_size:
            continue
        grid = grid_of(spec)
        W = torch.cat([weights(rows, 2 * spec.group_size) for rows, _ in shapes], 1)
        scales, zeros = grid.fit(W, "absmax")
        scales = scales * 0.9  # so that some weights lie outside the grid
        scales[0, 0, 0] = 0
        levels = grid.codebook(W.device)
        found = round_rows(
            W.view(-1, spec.group_size).to(device),
            scales.flatten().to(device),
            None if zeros is None else zeros.flatten().to(device),
            None if levels is None else levels.to(device),
            top=2**spec.bits - 1,
            tiny=LEAST_SCALE,
        )
        codes = grid.encode(W, scales, zeros)
        assert torch.equal(found[0].cpu().view(W.shape), codes), name
        assert torch.equal(found[1].cpu().view(W.shape), grid.decode(codes, scales, zeros)), name


@pytest.mark.parametrize("check", ["check_dequantize", "check_round"])
def test_kernels_equal_plain_pytorch_interpreted(check):
    pytest.importorskip("triton", reason="needs triton")
    code = f"import test_triton as t; t.{check}('cpu'); print('same')"
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    environment["PYTHONPATH"] = os.pathsep.join([str(Path(__file__).parent), *sys.path])
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False
    )
    assert done.stdout.strip().endswith("same"), done.stderr[-2000:]


@pytest.mark.gpu
def test_kernels_equal_plain_pytorch_on_the_gpu():
    check_dequantize("cuda", shapes=(*SHAPES, (515, 4096)))
    check_round("cuda")


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["nf2", "nf4", "int3", "sint4-g32-f16", "uniform4"])
@pytest.mark.parametrize("columns", [512, 520])
def test_rounding_on_the_gpu_equals_the_cpu(name, columns):
    W, spec = weights(7, columns), parse_format(name)
    on_cpu, values = round_to_nearest(W, spec, fit="absmax")
    on_gpu, others = round_to_nearest(W.cuda(), spec, fit="absmax")
    assert torch.equal(on_gpu.scales.cpu(), on_cpu.scales)
    assert torch.equal(on_gpu.codes.cpu(), on_cpu.codes)
    assert torch.equal(others.cpu(), values)


def test_the_dispatcher_says_why_it_uses_plain_pytorch():
    x = torch.zeros(2, 64)
    assert round_kernel(x, None) is None
    assert dequantize_kernel(x.byte(), 64) is None
    assert why_no_dequantize_kernel(x.byte(), -1) == (
        "one scale for the whole tensor, which no kernel holds"
    )
    assert "LOFTQ_CPU_ISA=none" in why_no_dequantize_kernel(x.byte(), 64)
    far = x.byte().to("meta")
    assert why_no_dequantize_kernel(far, 64) == "weights are on meta, the kernels need a GPU"
