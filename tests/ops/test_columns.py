"""Sweeps over a block of columns: the kernel bit for bit the reference, the reference its grid."""

import os
import subprocess
import sys
from itertools import product
from pathlib import Path

import pytest
import torch

from loftq.formats import grid_of, parse_format
from loftq.ops import descend_columns, round_columns
from loftq.ops.columns import descend_columns_reference, nearest, round_columns_reference
from loftq.ops.dispatch import why_no_columns_kernel

FORMATS = ("nf2-g64-f32", "nf4-g64-f32", "int2-g64-f32", "int4-g64-f32", "sint3-g64-f32",
           "iq4nl", "int8-g64-f32", "uniform4")  # fmt: skip
SHAPES = ((1, 1, 1), (2, 5, 37), (1, 33, 64), (2, 7, 128), (1, 3, 256), (1, 67, 16))
SPREADS = ("column", "row", "tensor")


def block(name, shape, spread):
    """A block, its factor, a Gram, and scales for each column, each row or the whole of it."""
    g = torch.Generator().manual_seed(sum(shape))
    n, _, width = shape
    spec = parse_format(name)
    grid = grid_of(spec)
    W = torch.randn(shape, generator=g)
    x = torch.randn(n, 2 * width, width, generator=g)
    gram = x.mT @ x / (2 * width) + 0.01 * torch.eye(width)
    factor = torch.linalg.cholesky(torch.linalg.inv(gram.double())).mT.float().contiguous()
    per_row = {"column": shape, "row": (*shape[:2], 1), "tensor": (n, 1, 1)}[spread]
    scales = 0.2 + torch.rand(per_row, generator=g)
    scales[0, 0, 0] = 0  # of a group without extent
    zeros = None
    if grid.codebook(torch.device("cpu")) is None:
        zeros = torch.randint(0, grid.top + 1, per_row, generator=g).float()
    return W, factor, gram, scales, zeros, grid


def check_round(device, name, shape, spread):
    from loftq.ops.triton import columns

    W, factor, _, given, moved = problem(name, shape, spread, device)
    wanted = round_columns_reference(W, factor, *given)
    found = columns.round_columns(W.to(device), factor.to(device), *moved)
    assert same(found, wanted), (name, shape, spread)


def check_descend(device, name, shape, spread):
    from loftq.ops.triton import columns

    W, _, gram, given, moved = problem(name, shape, spread, device)
    G = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    wanted = descend_columns_reference(W, G, gram, *given)
    found = columns.descend_columns(*(t.to(device) for t in (W, G, gram)), *moved)
    assert same(found, wanted), (name, shape, spread)


def problem(name, shape, spread, device):
    """Block, factor and Gram; scales, zeros, levels and top, here and on the device."""
    W, factor, gram, scales, zeros, grid = block(name, shape, spread)
    given = (scales, zeros, grid.codebook(W.device), grid.top)
    return W, factor, gram, given, [t.to(device) if torch.is_tensor(t) else t for t in given]


def same(found, wanted):
    return all(torch.equal(part.cpu(), other) for part, other in zip(found, wanted, strict=True))


def check_interpreted():
    for name, spread in product(("nf2-g64-f32", "int3-g64-f32", "uniform4"), SPREADS):
        check_round("cpu", name, (2, 5, 11), spread)
        check_descend("cpu", name, (2, 5, 11), spread)


def check_trials():
    """A trial passes the kernels, and fails one that codes every value alike."""
    from loftq.ops.triton import probe

    cpu = torch.device("cpu")
    assert probe.columns_are_right(cpu)
    assert probe.integer_search_is_right(cpu)
    probe.descend_columns = lambda Q, *_: (torch.zeros_like(Q, dtype=torch.uint8), Q)
    probe.search_integer_scales = lambda x, widest, zeros, *_, **__: (2 * widest, zeros)
    assert not probe.columns_are_right(cpu)
    assert not probe.integer_search_is_right(cpu)


@pytest.mark.parametrize("check", ["check_interpreted", "check_trials"])
def test_kernels_and_trials_interpreted(check):
    pytest.importorskip("triton", reason="needs triton")
    code = f"import test_columns as t; t.{check}(); print('same')"
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    environment["PYTHONPATH"] = os.pathsep.join([str(Path(__file__).parent), *sys.path])
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False
    )
    assert done.stdout.strip().endswith("same"), done.stderr[-2000:]


@pytest.mark.gpu
@pytest.mark.parametrize("check", [check_round, check_descend])
def test_kernels_equal_the_reference_on_the_gpu(check):
    """Every shape under every format, the spread of its scales in turn: most of it is compiling."""
    for (i, shape), (j, name) in product(enumerate(SHAPES), enumerate(FORMATS)):
        check("cuda", name, shape, SPREADS[(i + j) % len(SPREADS)])


@pytest.mark.parametrize("name", FORMATS)
def test_a_column_is_coded_as_its_grid_does(name):
    spread = "tensor" if name == "uniform4" else "row"
    W, _, _, scales, zeros, grid = block(name, (2, 9, 32), spread)
    if name == "uniform4":
        scales[0] = 0.5  # this grid never fits an empty range
    codes, values = nearest(W, scales, zeros, grid.codebook(W.device), grid.top)
    assert torch.equal(codes, grid.encode(W, scales, zeros))
    assert torch.equal(values, grid.decode(codes, scales, zeros))


@pytest.mark.parametrize("name", ["nf3-g64-f32", "int2-g64-f32"])
def test_sweeps_pass_opcheck(name, device):
    W, factor, gram, scales, zeros, grid = block(name, (2, 5, 37), "row")
    moved = [t if t is None else t.to(device) for t in (W, factor, gram, scales, zeros)]
    W, factor, gram, scales, zeros = moved
    rest = (scales, zeros, grid.codebook(W.device), grid.top)
    torch.library.opcheck(round_columns, (W, factor, *rest))
    torch.library.opcheck(descend_columns, (W, W.clone(), gram, *rest))


def test_a_grid_with_both_a_codebook_and_zeros_is_refused():
    W, factor, _, scales, _, grid = block("nf3-g64-f32", (1, 4, 8), "row")
    with pytest.raises(ValueError, match="either a codebook"):
        round_columns(W, factor, scales, scales, grid.codebook(W.device), grid.top)
    with pytest.raises(ValueError, match=r"expected float32 and \(1, 8, 8\)"):
        round_columns(W.double(), factor, scales, None, grid.codebook(W.device), grid.top)


def test_the_dispatcher_says_why():
    assert "need a GPU" in why_no_columns_kernel(torch.zeros(1, 2, 64))
    assert "the kernel holds 256" in why_no_columns_kernel(torch.zeros(1, 2, 300))
