"""The cost of an adapter on the original model, and when it is worth a warning."""

import pytest

from loftq.eval import LARGE_GAP, LossGap


def gap(packed: float, original: float) -> LossGap:
    return LossGap(packed=packed, original=original, tokens=1000, context=128)


def test_a_gap_is_positive_where_the_move_makes_it_worse() -> None:
    assert gap(2.0, 2.5).gap == pytest.approx(0.5)
    assert gap(2.5, 2.0).gap == pytest.approx(-0.5)
    assert gap(2.0, 2.25).to_dict() == {
        "packed": 2.0, "original": 2.25, "tokens": 1000, "context": 128, "gap": 0.25,
    }  # fmt: skip


def test_only_a_large_loss_warns() -> None:
    assert gap(2.0, 2.0 + LARGE_GAP / 2).warning == ""
    assert gap(2.5, 2.0).warning == ""
    text = gap(2.0, 2.0 + 2 * LARGE_GAP).warning
    assert "0.100 nats a token higher than on the packed one (2.100, 2.000)" in text
    assert "more bits" in text
