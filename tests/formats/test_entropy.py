"""The zero at the largest entropy of the codes, against IR-QLoRA's equation written out."""

import pytest
import torch

from loftq.formats import FITS, fits_of, grid_of, known_formats, parse_format
from loftq.formats.entropy import entropy, most_informative
from loftq.rounding import round_to_nearest


def groups(rows=12, columns=64, seed=0):
    """Skewed, so that the median is not the middle of the range."""
    g = torch.Generator().manual_seed(seed)
    return torch.randn(rows, columns, generator=g).exp() - 2


def by_hand(x, top):
    """(entropy, s, z) of one group under each zero that can be stored, in Python."""
    for z in range(top + 1):
        s = max(x.max().item() / (top - z + 0.5), -x.min().item() / (z + 0.5))
        tau = s * (top / 2 - z)
        assert 2 * (x - tau).abs().max().item() == pytest.approx(s * (top + 1), rel=1e-5)
        codes = (x / s + z).round().clamp(0, top).int().tolist()
        shares = torch.tensor([codes.count(v) / len(codes) for v in range(top + 1)])
        yield -(shares[shares > 0] * shares[shares > 0].log2()).sum().item(), s, z


def test_the_worked_case():
    x = torch.tensor([[-1.0, 0.0, 1.0, 2.0]])
    assert [part.item() for part in most_informative(x, 3)] == pytest.approx([0.8, 1.0])
    others = {z: (h, s) for h, s, z in by_hand(x[0], 3)}
    assert others[1] == pytest.approx((2.0, 4 / 5))
    assert others[2] == pytest.approx((1.5, 4 / 3))
    assert entropy(torch.tensor([[0.0, 1.0, 2.0, 3.0], [1.0, 2.0, 3.0, 3.0]]), 3).tolist() == [
        2.0,
        1.5,
    ]


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_no_other_zero_says_more(bits):
    x, top = groups(), 2**bits - 1
    s, z = most_informative(x, top)
    codes = (x / s[:, None] + z[:, None]).round().clamp(0, top)
    found = entropy(codes, top).tolist()
    assert ((z >= 0) & (z <= top) & (z == z.round()) & (s > 0)).all()
    for row, bits_found in zip(x, found, strict=True):
        assert bits_found == pytest.approx(max(h for h, _, _ in by_hand(row, top)), abs=1e-5)


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_codes_say_more_than_those_of_the_range(bits):
    g = torch.Generator().manual_seed(1)
    W, spec = torch.randn(1, 96, 128, generator=g), parse_format(f"int{bits}-g64-dq")
    said = {}
    for fit in ("absmax", "entropy"):
        codes = round_to_nearest(W, spec, fit=fit)[0].codes.reshape(-1, 64)
        said[fit] = entropy(codes.float(), 2**bits - 1).mean().item()
    assert said["entropy"] > said["absmax"]


def test_constant_and_empty_groups_have_a_scale():
    for x in (torch.zeros(2, 16), torch.full((2, 16), 3.0), torch.ones(2, 1)):
        s, z = most_informative(x, 3)
        assert torch.isfinite(s).all()
        assert torch.isfinite(z).all()
        assert (s > 0).all()


@pytest.mark.parametrize("fit", FITS)
@pytest.mark.parametrize("name", known_formats())
def test_a_fit_is_there_or_refused_as_told(name, fit):
    spec, W = parse_format(name), groups(4, 64)[None]
    if fit in fits_of(spec):
        scales, _ = grid_of(spec).fit(W, fit)
        assert torch.isfinite(scales).all()
        return
    with pytest.raises(ValueError, match=f"scale_fit={fit}"):
        grid_of(spec).fit(W, fit)
