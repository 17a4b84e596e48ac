"""Layers find their block and kind in any naming scheme."""

import pytest

from loftq.report.grid import error_grid, place, short_names
from loftq.report.inspect import LayerRow


def row(module: str, plain: float = 0.2, error: float = 0.1) -> LayerRow:
    return LayerRow(
        module=module, format="nf4-g64", shape=(8, 8), bits_per_weight=4.5, packed_bytes=36,
        plain_error=plain, error=error,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("module", "where"),
    [
        ("model.layers.3.mlp.up_proj", ("model.layers 3", "mlp.up_proj")),
        ("h.11.attn.c_attn", ("h 11", "attn.c_attn")),
        ("model.layers.0.mlp.experts.5.w1", ("model.layers 0", "mlp.experts.*.w1")),
        ("encoder.block.2.layer.0.SelfAttention.q", ("encoder.block 2", "layer.*.SelfAttention.q")),
        ("layers.7", ("layers 7", "layers")),
        ("7.linear", ("7", "linear")),
        ("model.embed2.proj", ("outside", "model.embed2.proj")),
    ],
)
def test_the_first_number_counts_the_blocks(module: str, where: tuple[str, str]) -> None:
    assert place(module) == where


def test_kinds_are_cut_as_far_as_they_stay_apart() -> None:
    kinds = ("attention.self.query", "attention.output.dense", "output.dense", "mlp.up")
    assert short_names(kinds) == ("query", "attention.output.dense", "output.dense", "up")


def test_a_grid_keeps_the_order_of_the_model_and_leaves_holes() -> None:
    grid = error_grid([row("m.0.b", 0.4, 0.3), row("m.0.a"), row("m.1.a", 0.6, 0.5)])
    assert grid.blocks == ("0", "1")
    assert grid.kinds == ("b", "a")
    assert grid.plain == ((0.4, 0.2), (None, 0.6))
    assert grid.adapted == ((0.3, 0.1), (None, 0.5))


def test_experts_of_one_kind_are_averaged() -> None:
    grid = error_grid([row("m.0.experts.0.w", 0.2), row("m.0.experts.1.w", 0.4)])
    assert grid.plain[0][0] == pytest.approx(0.3)


def test_two_stacks_keep_the_part_of_their_names_that_differs() -> None:
    stacks = [row("model.encoder.layers.0.q"), row("model.decoder.layers.0.q"), row("model.proj")]
    assert error_grid(stacks).blocks == ("encoder 0", "decoder 0", "outside")
