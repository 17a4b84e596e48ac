"""The Triton scale search against plain PyTorch: interpreted here, compiled where marked gpu."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from loftq.formats import parse_format
from loftq.formats.grids import SEARCH, CodebookGrid, IntegerGrid
from loftq.ops.dispatch import search_kernel, why_no_search_kernel

NAMES = ("nf2", "nf3", "nf4", "snf2", "iq4nl")
INTEGER_CASES = [("int2", 37), ("int3", 64), ("int4", 16)]
CASES = [(name, columns) for name in NAMES for columns in (16, 37, 64)]


def reference(x, spec):
    """argmin over the ratios in float64, by brute force."""
    levels = torch.tensor(spec.levels, dtype=torch.float64)
    low, high = -levels[0], levels[-1]
    widest = torch.maximum(x.amax(-1) / high, -x.amin(-1) / low)
    errors = []
    for ratio in SEARCH[spec.bits]:
        scale = (widest * ratio)[:, None, None]
        error = (x.double()[..., None] - levels * scale).square().amin(-1).sum(-1)
        errors.append(error)
    return widest, torch.stack(errors)


def check(device):
    from loftq.ops.triton.scale_search import search_scales

    for name, columns in CASES:
        spec = parse_format(name)
        x = torch.randn(101, columns, generator=torch.Generator().manual_seed(0))
        widest, errors = reference(x, spec)
        found = search_scales(
            x.to(device),
            widest.float().to(device),
            torch.tensor(spec.levels, device=device),
            torch.tensor(SEARCH[spec.bits], device=device),
        ).cpu()
        tried = widest.float()[None] * torch.tensor(SEARCH[spec.bits])[:, None]
        chosen = (tried - found).abs().argmin(0)
        assert ((tried - found).abs().amin(0) <= 1e-6 * found).all()
        error = errors.gather(0, chosen[None])[0]
        assert (error <= errors.amin(0) * (1 + 1e-5)).all(), name


def integer_errors(x, spec, scales, zeros):
    """Squared error of each row under its scale and zero, in float64."""
    s, z = scales[None, :, None], zeros[None, :, None]
    codes = IntegerGrid(spec.bits, 0).encode(x[None], s, z)
    return (x.double() - (codes.double() - z) * s.double())[0].square().sum(-1)


def check_integer(device, cases=INTEGER_CASES):
    """Scale and zero are those of the plain search, or as good to rounding."""
    from loftq.ops.triton.scale_search import search_integer_scales

    for name, columns in cases:
        spec = parse_format(name)
        grid = IntegerGrid(spec.bits, 0)
        x = torch.randn(61, columns, generator=torch.Generator().manual_seed(0))
        x[0] = 0
        x[1] += 3  # zero lies outside of the range
        widest, zeros = grid._fit(x, "absmax")
        wanted = integer_errors(x, spec, *grid._fit(x, "mse"))
        found = search_integer_scales(
            x.to(device), widest.to(device), zeros.to(device),
            torch.tensor(SEARCH[spec.bits], device=device),
            top=grid.top, shifts=2 if spec.bits == 2 else 1,
        )  # fmt: skip
        error = integer_errors(x, spec, *(part.cpu() for part in found))
        assert (error <= wanted * (1 + 1e-5)).all(), (name, columns)


@pytest.mark.parametrize("check", ["check", "check_integer"])
def test_kernel_chooses_the_best_ratio_interpreted(check):
    pytest.importorskip("triton", reason="needs triton")
    code = f"import test_scale_search as t; t.{check}('cpu'); print('same')"
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    paths = [str(Path(__file__).parent), *sys.path]
    environment["PYTHONPATH"] = os.pathsep.join(paths)
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False
    )
    assert done.stdout.strip().endswith("same"), done.stderr[-2000:]


@pytest.mark.gpu
def test_kernel_chooses_the_best_ratio_on_the_gpu():
    check("cuda")
    check_integer("cuda")


@pytest.mark.parametrize("name", ["nf2", "nf4"])
def test_plain_search_chooses_the_best_ratio(name):
    spec = parse_format(name)
    x = torch.randn(101, 64, generator=torch.Generator().manual_seed(0))
    widest, errors = reference(x, spec)
    found = CodebookGrid(spec.levels, spec.bits, 64)._search(x, widest.float())
    tried = widest.float()[None] * torch.tensor(SEARCH[spec.bits])[:, None]
    error = errors.gather(0, (tried - found).abs().argmin(0)[None])[0]
    assert (error <= errors.amin(0) * (1 + 1e-2)).all()


def test_the_dispatcher_says_why():
    assert search_kernel(torch.zeros(2, 64)) is None
    assert "need a GPU" in why_no_search_kernel(torch.zeros(2, 64))
