"""Rounding in the CPU library: scales, codes, values and bytes are those of the reference."""

import pytest
import torch

from loftq.formats import parse_format
from loftq.formats.grids import SEARCH, grid_of
from loftq.formats.packing import pack_codes
from loftq.ops.columns import nearest
from loftq.ops.cpu.rounding import fit_scales, round_rows
from loftq.ops.cpu.rounding import pack_codes as pack_in_library
from loftq.ops.dispatch import fit_kernel, pack_kernel, round_kernel, why_no_rounding_on_cpu
from loftq.ops.scale_search import fit_scales_reference, squared_error

FORMATS = ("nf4", "nf3", "nf2", "snf3", "even2", "iq4nl", "sint4", "int2", "int3", "int4", "int8")
COLUMNS = (1, 16, 37, 64, 128, 4097)


def groups(columns, generator, rows=97):
    """Normal groups; among them constants, outliers, one sign only, numbers near zero, and ties."""
    x = torch.randn(rows, columns, generator=generator)
    x[0] = 0
    x[1] = 1
    x[2] *= 1e-38
    x[3, 0] = 100
    x[4] = x[4].abs()
    x[5] = -x[5].abs()
    x[6] = torch.randint(-8, 9, (columns,), generator=generator) / 8
    return x


def grid_of_format(name):
    """(grid, levels or None) of a format's name."""
    grid = grid_of(parse_format(name))
    return grid, grid.codebook(torch.device("cpu"))


def equal(found, wanted):
    """Whether tensors, or None, agree in every number."""
    pairs = zip(found, wanted, strict=True)
    return all(a is b if b is None else torch.equal(a, b) for a, b in pairs)


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("rule", ["absmax", "mse"])
def test_scales_are_those_of_the_reference(isa, name, rule, generator):
    grid, levels = grid_of_format(name)
    ratios = SEARCH[grid.bits] if rule == "mse" else ()
    options = {"top": grid.top, "shifts": grid.shifts}
    for columns in COLUMNS:
        x = groups(columns, generator)
        wanted = fit_scales_reference(x, levels, ratios, **options)
        assert equal(fit_scales(x, levels, ratios, **options), wanted), columns


@pytest.mark.parametrize("name", FORMATS)
def test_codes_and_values_are_those_of_the_reference(isa, name, generator):
    grid, levels = grid_of_format(name)
    for columns in COLUMNS:
        x = groups(columns, generator)
        scales, zeros = fit_scales_reference(x, levels, (), top=grid.top)
        scales[7], scales[8] = 0, -scales[8]
        spread = None if zeros is None else zeros[:, None]
        wanted = nearest(x, scales[:, None], spread, levels, grid.top)
        assert equal(round_rows(x, scales, zeros, levels, top=grid.top), wanted), columns


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_packed_codes_are_those_of_the_reference(isa, bits, generator, monkeypatch):
    for columns in COLUMNS:
        codes = torch.randint(2**bits, (3, 5, columns), dtype=torch.uint8, generator=generator)
        found = pack_codes(codes, bits)
        with monkeypatch.context() as patch:
            patch.setattr("loftq.formats.packing.pack_kernel", lambda codes: None)
            assert torch.equal(found, pack_codes(codes, bits))


WEIGHTS = ("nf4-g64", "nf3-channel-f32", "nf2-g64", "snf3-g64", "even2-g32", "iq4nl", "sint4-g128",
           "int4-g64", "int3-g64-f16", "int2-g32-dq", "int8-g64")  # fmt: skip


@pytest.mark.parametrize("name", WEIGHTS)
def test_a_weight_is_rounded_as_without_the_library(library, name, generator, monkeypatch):
    """All but the searched scales are the same numbers; those are as good."""
    spec, W = parse_format(name), torch.randn(2, 33, 200, generator=generator)
    grid = grid_of(spec)
    found = {rule: grid.fit(W, rule) for rule in ("absmax", "mse")}
    rounded = grid.round(W, *found["absmax"])
    for seam in ("fit_kernel", "round_kernel"):
        monkeypatch.setattr(f"loftq.formats.grids.{seam}", lambda *arguments: None)
    assert equal(found["absmax"], grid.fit(W, "absmax"))
    assert equal(rounded, grid.round(W, *found["absmax"]))
    errors = [
        (W - grid.round(W, *scales)[1]).norm() for scales in (found["mse"], grid.fit(W, "mse"))
    ]
    assert errors[0] <= errors[1] * (1 + 1e-5)


def test_a_weight_that_is_no_number_gives_a_scale_that_is_none(isa):
    levels = grid_of_format("nf4")[1]
    x = torch.ones(3, 40)
    x[1, 38] = torch.nan
    for ratios in ((), SEARCH[4]):
        scales, _ = fit_scales(x, levels, ratios, top=15)
        assert scales.isnan().tolist() == [False, True, False]


def test_a_grid_that_the_library_does_not_hold_is_refused(library):
    x, levels = torch.ones(2, 64), torch.linspace(-1, 1, 5)
    with pytest.raises(AssertionError, match="refused"):
        fit_scales(x, levels, (), top=4)
    with pytest.raises(AssertionError, match="refused"):
        round_rows(x, torch.ones(2), None, levels, top=4)
    with pytest.raises(AssertionError, match="refused"):
        pack_in_library(torch.zeros(2, 64, dtype=torch.uint8), 5, 40)


def test_threads_change_nothing(library, generator):
    grid, levels = grid_of_format("nf3")
    x = torch.randn(20000, 64, generator=generator)
    options = {"top": grid.top, "shifts": grid.shifts}
    alone = fit_scales(x, levels, SEARCH[3], **options)
    torch.set_num_threads(2)
    try:
        assert equal(fit_scales(x, levels, SEARCH[3], **options), alone)
    finally:
        torch.set_num_threads(1)


def test_a_sum_of_squares_is_exact_to_rounding(generator):
    x = torch.randn(5, 77, generator=generator)
    exact = x.double().square().sum(-1)
    assert torch.allclose(squared_error(x).double(), exact, rtol=1e-6, atol=0)


def test_the_dispatcher_says_why_weights_are_rounded_in_pytorch(library):
    x, many = torch.ones(2, 64), torch.arange(256.0)
    assert why_no_rounding_on_cpu(x, None) == ""
    assert "torch.float64 on cpu" in why_no_rounding_on_cpu(x.double(), None)
    assert "a codebook of 256 levels" in why_no_rounding_on_cpu(x, many)
    assert "a codebook of 5 levels" in why_no_rounding_on_cpu(x, many[:5])
    assert fit_kernel(x, many) is round_kernel(x, many) is None
    assert pack_kernel(x) is None
