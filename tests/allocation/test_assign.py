from typing import NamedTuple

import pytest

from loftq.allocation import assign_formats, first_k_blocks, matches
from loftq.formats import parse_format

NF2, NF3, NF4 = map(parse_format, ("nf2", "nf3", "nf4"))


class Layer(NamedTuple):
    module: str
    depth: int | None


def layers(blocks: int = 4) -> list[Layer]:
    inner = [
        Layer(f"model.layers.{i}.{name}", i)
        for i in range(blocks)
        for name in ("self_attn.q_proj", "mlp.down_proj")
    ]
    return [Layer("model.embed_tokens", None), *inner]


@pytest.mark.parametrize(
    ("bits", "blocks", "k"),
    [
        *((3, 32, 16), (2.5, 32, 8), (2.25, 32, 4)),
        *((3, 40, 20), (2.5, 40, 10), (2.25, 40, 5)),
        *((2, 32, 0), (4, 32, 32), (2.3, 20, 3), (2.9, 20, 9), (2.49, 4, 0), (2.5, 4, 1)),
    ],
)
def test_first_k_blocks_is_the_papers_rule(bits, blocks, k):
    assert first_k_blocks(bits, blocks) == k


def test_the_average_never_exceeds_what_was_asked_for():
    for blocks in (1, 7, 24, 40):
        for hundredths in range(200, 401):
            k = first_k_blocks(hundredths / 100, blocks)
            assert 4 * k + 2 * (blocks - k) <= hundredths / 100 * blocks + 1e-6


@pytest.mark.parametrize("bits", [1.9, 4.1, float("nan"), float("inf")])
def test_bits_out_of_range_are_refused(bits):
    with pytest.raises(ValueError, match="between 2 and 4"):
        first_k_blocks(bits, 32)


def test_a_model_without_blocks_has_no_depth():
    with pytest.raises(ValueError, match="repeated blocks"):
        first_k_blocks(3, 0)


def test_first_blocks_get_their_format_and_embeddings_do_not():
    formats = assign_formats(layers(), NF2, first=(1, NF4))
    assert list(formats) == [layer.module for layer in layers()]
    assert [m for m, spec in formats.items() if spec == NF4] == [
        "model.layers.0.self_attn.q_proj",
        "model.layers.0.mlp.down_proj",
    ]
    assert formats["model.embed_tokens"] == NF2


def test_the_last_matching_override_wins_over_the_others_and_over_depth():
    formats = assign_formats(
        layers(), NF2, first=(2, NF4), overrides={"mlp": NF3, "layers.1": NF2, "*.3.*": NF4}
    )
    assert formats["model.layers.0.mlp.down_proj"] == NF3
    assert formats["model.layers.0.self_attn.q_proj"] == NF4
    assert formats["model.layers.1.mlp.down_proj"] == NF2
    assert formats["model.layers.3.mlp.down_proj"] == NF4
    reverse = assign_formats(layers(), NF2, overrides={"layers.1": NF2, "mlp": NF3})
    assert reverse["model.layers.1.mlp.down_proj"] == NF3


def test_a_pattern_without_a_match_is_refused_with_the_nearest_name():
    with pytest.raises(
        ValueError, match=r"'down_porj' matches no module. Did you mean 'down_proj'"
    ):
        assign_formats(layers(), NF2, overrides={"down_porj": NF4})


@pytest.mark.parametrize("k", [-1, 5])
def test_more_first_blocks_than_there_are_is_refused(k):
    with pytest.raises(ValueError, match="lie in 4 blocks"):
        assign_formats(layers(), NF2, first=(k, NF4))


@pytest.mark.parametrize(
    ("pattern", "selected"),
    [
        ("q_proj", True),
        ("self_attn", True),
        ("self_attn.q_proj", True),
        ("layers.1", True),
        ("model.layers.1.self_attn.q_proj", True),
        ("*.q_proj", True),
        ("layers.[01].*", True),
        ("model", True),
        ("proj", False),
        ("layers.11", False),
        ("ayers.1", False),
        ("Q_PROJ", False),
    ],
)
def test_a_pattern_selects_paths_from_any_dot_and_what_lies_below(pattern, selected):
    assert matches(pattern, "model.layers.1.self_attn.q_proj") is selected
