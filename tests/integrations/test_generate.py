"""One answer: the tokens of a plain greedy loop, an end where the turn ends, no trace elsewhere."""

from typing import Any

import pytest
import torch
from torch import nn

import zoo
from loftq.integrations.generate import Answer, Sampling, _Streamer, answer, stop_tokens
from spoken import TEMPLATE, byte_tokenizer, word_tokenizer

PROMPT = [6, 7, 8]


@pytest.fixture
def model() -> nn.Module:
    found = zoo.build("llama")
    found.generation_config.eos_token_id = None
    return found


@pytest.fixture
def tokenizer() -> Any:
    return word_tokenizer()


@torch.no_grad()
def greedy(model: nn.Module, ids: list[int], count: int) -> list[int]:
    """The likeliest tokens one after the other, everything computed again for each."""
    ids = list(ids)
    for _ in range(count):
        ids.append(int(model(torch.tensor([ids])).logits[0, -1].argmax()))
    return ids[-count:]


def spoken(tokenizer: Any, ids: list[int]) -> str:
    return tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)


def test_an_answer_is_the_greedy_continuation(model: nn.Module, tokenizer: Any) -> None:
    found = answer(model, tokenizer, PROMPT, Sampling(max_new_tokens=12))
    assert found.text == spoken(tokenizer, greedy(model, PROMPT, 12))
    assert (found.tokens, found.prompt_tokens, found.ended) == (12, 3, "length")
    assert 0 < found.first_seconds < found.seconds


def test_the_models_own_generation_settings_do_not_enter(model: nn.Module, tokenizer: Any) -> None:
    plain = answer(model, tokenizer, PROMPT, Sampling(max_new_tokens=8))
    model.generation_config.update(do_sample=True, temperature=5.0, top_k=3, repetition_penalty=9.0)
    assert answer(model, tokenizer, PROMPT, Sampling(max_new_tokens=8)).text == plain.text


def test_the_pieces_are_the_text(model: nn.Module, tokenizer: Any) -> None:
    pieces: list[str] = []
    found = answer(model, tokenizer, PROMPT, Sampling(max_new_tokens=9), on_text=pieces.append)
    assert "".join(pieces) == found.text
    assert len(pieces) > 1


def test_it_ends_at_a_stop_token(model: nn.Module, tokenizer: Any) -> None:
    third = greedy(model, PROMPT, 3)[-1]
    model.generation_config.eos_token_id = [third]
    found = answer(model, tokenizer, PROMPT, Sampling(max_new_tokens=50))
    assert found.ended == "stop"
    assert found.tokens <= 3


def test_draws_repeat_with_their_seed_and_leave_the_generator_alone(
    model: nn.Module, tokenizer: Any
) -> None:
    state = torch.get_rng_state()
    drawn = [
        answer(model, tokenizer, PROMPT, Sampling(max_new_tokens=20, temperature=2.0, seed=seed))
        for seed in (1, 1, 2)
    ]
    assert drawn[0].text == drawn[1].text != drawn[2].text
    assert torch.equal(torch.get_rng_state(), state)


def test_a_tiny_nucleus_is_greedy(model: nn.Module, tokenizer: Any) -> None:
    drawn = Sampling(max_new_tokens=10, temperature=1.0, top_p=1e-6)
    plain = Sampling(max_new_tokens=10)
    assert answer(model, tokenizer, PROMPT, drawn).text == answer(
        model, tokenizer, PROMPT, plain
    ).text  # fmt: skip


@pytest.mark.parametrize("training", [True, False])
def test_the_mode_of_the_model_is_kept(model: nn.Module, tokenizer: Any, training: bool) -> None:
    model.train(training)
    answer(model, tokenizer, PROMPT, Sampling(max_new_tokens=1))
    assert model.training is training


def test_an_interrupted_answer_is_kept_only_if_asked(model: nn.Module, tokenizer: Any) -> None:
    pieces: list[str] = []

    def listen(piece: str) -> None:
        pieces.append(piece)
        if len(pieces) == 3:
            raise KeyboardInterrupt

    found = answer(model, tokenizer, PROMPT, on_text=listen, interruptible=True)
    assert found.ended == "interrupted"
    assert found.text == "".join(pieces)
    pieces.clear()
    with pytest.raises(KeyboardInterrupt):
        answer(model, tokenizer, PROMPT, on_text=listen)


def test_the_turn_of_the_template_ends_an_answer(model: nn.Module) -> None:
    assert stop_tokens(model, word_tokenizer(None)) == [2]
    assert stop_tokens(model, word_tokenizer()) == [2, 4]
    model.generation_config.eos_token_id = [2, 9]
    assert stop_tokens(model, word_tokenizer()) == [2, 9, 4]


def test_a_template_without_an_end_mark_adds_none(model: nn.Module) -> None:
    open_ended = TEMPLATE.replace(" <|im_end|>", "")
    assert stop_tokens(model, word_tokenizer(open_ended)) == [2]


def test_no_half_character_is_passed_on() -> None:
    tokenizer, text, pieces = byte_tokenizer(), "naïve 🌊 水", []
    streamer = _Streamer(tokenizer, pieces.append)
    streamer.put(torch.tensor([PROMPT]))
    for token in tokenizer(text)["input_ids"]:
        streamer.put(torch.tensor([token]))
    streamer.finish()
    assert "".join(pieces) == streamer.text == text
    assert "🌊" in pieces


def test_a_character_cut_by_the_limit_is_said_at_the_end() -> None:
    tokenizer, pieces = byte_tokenizer(), []
    streamer = _Streamer(tokenizer, pieces.append)
    streamer.put(torch.tensor([PROMPT]))
    for token in tokenizer("a🌊")["input_ids"][:3]:
        streamer.put(torch.tensor([token]))
    assert pieces == ["a"]
    streamer.finish()
    assert streamer.text == "a�"


def test_speed_is_unknown_for_a_single_token() -> None:
    times = {"text": "", "prompt_tokens": 1, "ended": "length"}
    assert Answer(tokens=1, seconds=2.0, first_seconds=2.0, **times).tokens_per_second is None
    assert Answer(tokens=5, seconds=3.0, first_seconds=1.0, **times).tokens_per_second == 2.0


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("max_new_tokens", 0), ("temperature", -0.1), ("temperature", float("nan")), ("top_p", 0.0),
        ("top_p", 1.5), ("repetition_penalty", 0.0),
    ],
)  # fmt: skip
def test_a_setting_out_of_range_is_refused(field: str, value: float) -> None:
    with pytest.raises(ValueError, match=f"{field}={value}: must be"):
        Sampling(**{field: value})


def test_an_empty_prompt_is_refused(model: nn.Module, tokenizer: Any) -> None:
    with pytest.raises(ValueError, match="no token"):
        answer(model, tokenizer, [])
