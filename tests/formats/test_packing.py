import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from loftq.formats import pack_codes, unpack_codes
from loftq.ops.reference import row_bytes


@given(
    bits=st.sampled_from((2, 3, 4, 8)),
    rows=st.integers(1, 5),
    columns=st.integers(1, 300),
    seed=st.integers(0, 2**31),
)
def test_pack_round_trip_is_bit_exact(bits, rows, columns, seed):
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(0, 2**bits, (rows, columns), dtype=torch.uint8, generator=generator)
    packed = pack_codes(codes, bits)
    assert packed.shape == (rows, row_bytes(columns, bits))
    assert torch.equal(unpack_codes(packed, columns, bits), codes)


def test_three_bits_take_exactly_three_bits():
    assert row_bytes(4096, 3) * 8 == 3 * 4096


@pytest.mark.parametrize(
    ("bits", "codes", "stored"),
    [
        (4, [1, 2, 15], [0x21, 0x0F]),
        (2, [1, 2, 3, 0, 1], [0b00_11_10_01, 0b01]),
        (8, [7, 255], [7, 255]),
        # low planes 1, 2, 3, 0 | 1, then high bits 1, 0, 1, 0, 1
        (3, [5, 2, 7, 0, 5], [0b00_11_10_01, 0b01, 0b10101]),
    ],
)
def test_low_bits_come_first(bits, codes, stored):
    packed = pack_codes(torch.tensor([codes], dtype=torch.uint8), bits)
    assert packed.tolist() == [stored]


def test_leading_dimensions_are_kept():
    codes = torch.randint(0, 8, (2, 3, 19), dtype=torch.uint8)
    assert torch.equal(unpack_codes(pack_codes(codes, 3), 19, 3), codes)
