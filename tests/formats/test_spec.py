import pytest
from hypothesis import given
from hypothesis import strategies as st

from loftq.formats import FormatSpec, component_shapes, known_formats, parse_format
from loftq.formats.spec import GRID_BITS, GROUP_SIZES


@st.composite
def specs(draw):
    grid = draw(st.sampled_from(sorted(set(GRID_BITS) - {"uniform"})))
    return FormatSpec(
        grid=grid,
        bits=draw(st.sampled_from(GRID_BITS[grid])),
        group_size=draw(st.sampled_from((*GROUP_SIZES, 0))),
        scale_coding=draw(st.sampled_from(("dq", "f16", "bf16", "f32"))),
    )


@given(spec=specs())
def test_name_parses_back_to_the_same_spec(spec):
    assert parse_format(str(spec)) == spec


@given(spec=specs(), out_features=st.integers(1, 400), in_features=st.integers(1, 400))
def test_bits_per_weight_count_every_stored_byte(spec, out_features, in_features):
    stored = 0
    for shape in component_shapes(spec, (out_features, in_features)).values():
        size = 1
        for extent in shape:
            size *= extent
        stored += size
    bits = spec.bits_per_weight(out_features, in_features)
    assert bits * out_features * in_features == pytest.approx(8 * stored)


@pytest.mark.parametrize(
    ("name", "full"),
    [
        ("nf4", "nf4-g64-dq"),
        ("nf2-g32", "nf2-g32-dq"),
        ("int3-g128-f16", "int3-g128-f16"),
        ("sint8-channel-bf16", "sint8-channel-bf16"),
        ("iq4nl", "iq4nl-g32-f16"),
        ("uniform2", "uniform2-tensor-f32"),
    ],
)
def test_defaults_are_filled_in(name, full):
    assert str(parse_format(name)) == full


@pytest.mark.parametrize("name", known_formats())
def test_every_known_short_name_parses(name):
    assert str(parse_format(name)).startswith(name)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("nf5", "5 bits do not exist; choose 2, 3, 4"),
        ("nff4", "Did you mean nf4"),
        ("nf4-g48", "group_size=48 does not exist; choose one of 16, 32"),
        ("int4-tensor", "only `uniform` has one scale"),
        ("uniform2-g64", "only `uniform` has one scale"),
        ("iq4nl4", "unknown format"),
        ("", "A name is GRID"),
    ],
)
def test_unknown_names_say_what_would_do(name, message):
    with pytest.raises(ValueError, match=message):
        parse_format(name)


@pytest.mark.parametrize(
    ("name", "bits"),
    [("nf4-g64-f32", 4.5), ("nf4-g64-bf16", 4.25), ("nf3-g64-f16", 3.25), ("nf2-g64-f32", 2.5)],
)
def test_documented_bits_per_weight(name, bits):
    assert parse_format(name).bits_per_weight(4096, 4096) == bits


def test_nested_scales_cost_an_eighth_of_a_bit():
    assert parse_format("nf4").bits_per_weight(4096, 4096) == pytest.approx(4.127, abs=1e-3)
