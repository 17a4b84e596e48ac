import pytest
import torch

from loftq.formats import FITS, default_fit, grid_of, parse_format
from loftq.formats.grids import _lookup
from loftq.rounding import round_to_nearest

GRIDS = ("nf4", "nf3", "nf2", "snf2", "iq4nl", "int4", "int3", "int2", "sint4", "sint2", "int8")
SHAPES = ((1, 1), (3, 37), (5, 63), (4, 130), (37, 256))


def weights(*shape, seed=0):
    return torch.randn(2, *shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("name", [*GRIDS, "even2", "uniform2", "nf4-channel", "int3-g16-bf16"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_packed_weight_dequantizes_to_the_rounded_values_bit_for_bit(name, shape):
    W, spec = weights(*shape), parse_format(name)
    rounded, values = round_to_nearest(W, spec, fit=default_fit(spec))
    for i in range(2):
        stored = rounded.pack(i)
        assert torch.equal(stored.dequantize(), values[i])
        assert stored.nbytes * 8 == pytest.approx(spec.bits_per_weight(*shape) * W[i].numel())


@pytest.mark.parametrize("name", GRIDS)
def test_requantizing_with_its_own_scales_returns_the_same_codes(name):
    W, grid = weights(6, 128), grid_of(parse_format(name))
    scales, zeros = grid.fit(W, "absmax")
    codes = grid.encode(W, scales, zeros)
    again = grid.encode(grid.decode(codes, scales, zeros), scales, zeros)
    assert torch.equal(codes, again)


@pytest.mark.parametrize("name", GRIDS)
def test_codes_are_nearest(name):
    W, spec = weights(4, 96), parse_format(name)
    grid = grid_of(spec)
    scales, zeros = grid.fit(W, "mse")
    chosen = grid.decode(grid.encode(W, scales, zeros), scales, zeros)
    best = torch.full_like(W, torch.inf)
    for code in range(2**spec.bits):
        value = grid.decode(torch.full_like(W, code, dtype=torch.uint8), scales, zeros)
        best = torch.minimum(best, (W - value).abs())
    assert torch.allclose((W - chosen).abs(), best, atol=1e-6)


@pytest.mark.parametrize("name", GRIDS)
def test_error_search_is_never_worse_than_absmax(name):
    W, spec = weights(16, 256), parse_format(name + "-f32" if "-" in name else f"{name}-g64-f32")
    errors = {
        fit: (W - round_to_nearest(W, spec, fit=fit)[1]).norm().item() for fit in ("absmax", "mse")
    }
    assert errors["mse"] <= errors["absmax"] * (1 + 1e-6)


@pytest.mark.parametrize("name", GRIDS)
def test_zero_blocks_and_tiny_and_huge_values_survive(name):
    W = weights(3, 128)
    W[0, 0] = 0
    W[0, 1] = 1e-38
    W[0, 2] = 1e30
    spec = parse_format(f"{name}-g64-f32")
    values = round_to_nearest(W, spec, fit="mse")[1]
    assert torch.isfinite(values).all()
    assert (values[0, 0].abs() < 1e-28).all()
    assert torch.allclose(values[0, 2], W[0, 2], rtol=0.7)


def test_scales_that_overflow_float16_are_refused():
    W = torch.full((1, 1, 64), 1e6)
    with pytest.raises(ValueError, match="overflows f16; use -bf16"):
        round_to_nearest(W, parse_format("int4-g64-f16"), fit="absmax")


@pytest.mark.parametrize("name", ["nf4", "nf3", "snf4", "iq4nl", "nf2"])
def test_table_lookup_equals_binary_search(name):
    levels = parse_format(name).levels
    bounds = torch.tensor(levels)
    bounds = (bounds[1:] + bounds[:-1]) / 2
    u = torch.randn(1 << 18, generator=torch.Generator().manual_seed(0)) * max(levels) / 2
    u[: len(bounds)] = bounds
    u[100 : 100 + len(bounds)] = torch.nextafter(bounds, torch.tensor(torch.inf))
    u[200 : 200 + len(bounds)] = torch.nextafter(bounds, torch.tensor(-torch.inf))
    table = _lookup(levels, torch.device("cpu"))
    assert torch.equal(table.encode(u), torch.bucketize(u, bounds, out_int32=True))


def test_sigma_belongs_to_the_papers_uniform_grids():
    with pytest.raises(ValueError, match="sigma is for the grids"):
        round_to_nearest(weights(2, 64), parse_format("nf4"), fit="sigma")
    assert default_fit(parse_format("uniform2")) == "sigma"
    assert set(FITS) == {"absmax", "mse", "sigma", "entropy"}
