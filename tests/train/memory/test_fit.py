"""What is chosen for a budget: quality first, and a refusal that says what is needed."""

from __future__ import annotations

from functools import cache

import pytest
import transformers as hf

from loftq.train.memory import NothingFits, Subject, fit, parse_size, subject_of_config, usable
from loftq.train.memory.budget import CONTEXT


@cache
def configure(**options: object) -> Subject:
    """A model of 12 million weights, half of them in its tables."""
    config = hf.Qwen3Config(
        vocab_size=8000, hidden_size=256, intermediate_size=768, num_hidden_layers=8,
        num_attention_heads=4, num_key_value_heads=2, head_dim=64, tie_word_embeddings=False,
        max_position_embeddings=4096,
    )  # fmt: skip
    return subject_of_config(config, name="small", **options)


def budget(room: float) -> int:
    """The size of a card that leaves `room` MB to tensors."""
    return int(room * 1e6 / 0.96) + CONTEXT + 1


def test_with_room_nothing_is_given_up() -> None:
    found = fit(configure, 24 * 10**9, longest=512)
    assert found.options == {"bits": 4, "rank": 16, "embedding": 16, "head": 16}
    assert (found.settings.batch_size, found.settings.accumulation) == (4, 2)
    assert found.settings.length == 512
    assert not found.settings.checkpointing
    assert found.peak.total <= found.usable < found.budget


def test_less_room_takes_speed_before_quality_and_bits_before_context() -> None:
    order = []
    for room in (450, 300, 250, 200, 170, 150, 130, 120, 110):
        try:
            found = fit(configure, budget(room), longest=1024)
        except NothingFits:
            break
        assert found.peak.total <= found.usable
        assert found.settings.batch_size * found.settings.accumulation == 8
        order.append(
            (found.options["rank"], found.settings.length, found.options["bits"],
             found.options["embedding"], found.settings.batch_size)
        )  # fmt: skip
    assert len(set(order)) > 2
    assert order == sorted(order, reverse=True)


def test_what_the_user_fixed_stays() -> None:
    found = fit(configure, 24 * 10**9, fixed={"bits": 2, "rank": 8, "head": 8, "length": 300})
    assert found.options == {"bits": 2, "rank": 8, "embedding": 16, "head": 8}
    assert found.settings.length == 300
    asked = {choice.name for choice in found.choices if choice.reason == "as asked"}
    assert asked == {"bits", "rank", "head", "context"}


def test_a_tied_embedding_cannot_be_asked_onto_the_host() -> None:
    tied = hf.Qwen3Config(
        vocab_size=800, hidden_size=64, intermediate_size=96, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, head_dim=16, tie_word_embeddings=True,
    )  # fmt: skip
    with pytest.raises(ValueError, match="host_embedding=true: the head shares"):
        fit(
            lambda **options: subject_of_config(tied, name="tied", **options),
            24 * 10**9,
            fixed={"embedding_on_host": True},
        )


def test_the_data_and_the_model_bound_the_context() -> None:
    assert fit(configure, 24 * 10**9, limit=512).settings.length == 512
    assert fit(configure, 24 * 10**9, longest=77, limit=512).settings.length == 77


def test_when_nothing_fits_the_smallest_need_is_said() -> None:
    with pytest.raises(NothingFits, match=r"nothing fits\. The least .* is 0\.\d+ GB \(2 bits"):
        fit(configure, budget(20))


def test_sizes() -> None:
    assert parse_size("8GB") == parse_size(" 8 gb ") == 8 * 10**9
    assert parse_size("7.5GiB") == int(7.5 * 2**30)
    assert usable(10 * 10**9, "cpu") == 6 * 10**9
    assert usable(8 * 10**9, "cuda") == pytest.approx(7.2e9)


@pytest.mark.parametrize("text", ["8", "GB", "eight GB", "8 bananas", "-8GB", "0GB", ""])
def test_other_words_are_refused(text: str) -> None:
    with pytest.raises(ValueError, match=r"not a size\. Write a number with its unit"):
        parse_size(text)
