import pytest
import torch

from loftq.formats.codebooks import (
    even_levels,
    normal_float,
    normal_float_recipe,
    symmetric_normal_float,
)
from loftq.ops import dynamic_map


def test_nf2_and_nf3_are_the_papers_tables():
    assert normal_float(2) == pytest.approx((-1, 0, 0.33791521, 1), abs=1e-7)
    nf3 = (-1, -0.4786292, -0.2171418, 0, 0.1609302, 0.3379152, 0.5626170, 1)
    assert normal_float(3) == pytest.approx(nf3, abs=1e-7)


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_tables_follow_the_recipe(bits):
    assert normal_float(bits) == pytest.approx(normal_float_recipe(bits), abs=2e-6)


def test_nf2_is_a_subset_of_nf4():
    assert set(normal_float(2)) <= set(normal_float(4))


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_levels_ascend_and_reach_one(bits):
    for levels in (normal_float(bits), symmetric_normal_float(bits), even_levels(bits)):
        assert len(levels) == 2**bits
        assert list(levels) == sorted(levels)
        assert levels[-1] == 1
        assert levels[0] == pytest.approx(-1)


def test_symmetric_levels_mirror():
    assert symmetric_normal_float(2) == pytest.approx((-1, -0.25257, 0.25257, 1), abs=1e-5)


def test_tables_equal_bitsandbytes_to_the_bit():
    functional = pytest.importorskip("bitsandbytes.functional", reason="needs bitsandbytes")
    theirs = functional.create_dynamic_map(signed=True)
    assert torch.equal(dynamic_map(), theirs.float())
    table = functional.get_4bit_type("nf4", device="cpu")
    assert torch.equal(torch.tensor(normal_float(4)), table)
