"""A model in conversation: memory, limits, draws, and weights that are dense or packed."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

import loftq
import zoo
from loftq.chat import Session, open_session, session
from loftq.integrations import generate
from loftq.integrations.generate import Sampling
from loftq.nn import packed_layers
from spoken import word_tokenizer


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("chat")
    zoo.save(zoo.build("llama"), folder / "source")
    word_tokenizer().save_pretrained(folder / "source")
    loftq.quantize(folder / "source", folder / "out", rank=4, bits=2)
    return folder


def talker(folder: Path, **options: object) -> Session:
    sampling = Sampling(max_new_tokens=6, **options)  # type: ignore[arg-type]
    return open_session(folder / "out", device="cpu", sampling=sampling)


def test_the_second_answer_knows_the_first(work: Path) -> None:
    talk = talker(work)
    first = talk.reply("one two")
    second = talk.reply("one two")
    assert second.answer.prompt_tokens > 2 * first.answer.prompt_tokens - 4
    talk.reset()
    assert talk.reply("one two").answer.text == first.answer.text


def test_draws_differ_from_turn_to_turn_and_repeat_from_session_to_session(work: Path) -> None:
    talks = [talker(work, temperature=3.0, seed=5) for _ in range(2)]
    said = [[talk.reply("one").answer.text for _ in range(3)] for talk in talks]
    assert said[0] == said[1]
    assert len(set(said[0])) > 1


def test_a_full_context_cuts_the_answer_and_says_so(
    work: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(generate, "stop_tokens", lambda model, tokenizer: [])
    talk = talker(work)
    context = talk.opened.context
    assert context is not None
    talk.sampling = replace(talk.sampling, max_new_tokens=10 * context)
    talk.opened.model.generation_config.eos_token_id = None
    reply = talk.reply("one " * (context - 12))
    assert (reply.answer.ended, reply.context_full) == ("length", True)
    assert reply.answer.prompt_tokens + reply.answer.tokens == context
    talk.sampling = replace(talk.sampling, max_new_tokens=2)
    again = talk.reply("two")
    assert again.forgotten == 1
    assert not again.context_full


@pytest.mark.parametrize("weights", ["packed", "dense"])
def test_dense_and_packed_weights_say_the_same(work: Path, weights: str) -> None:
    talk = open_session(work / "out", device="cpu", weights=weights)
    assert (len(packed_layers(talk.opened.model)) > 0) is (weights == "packed")
    model = loftq.load(work / "out")
    with torch.no_grad():
        there, here = model(zoo.tokens()).logits, talk.opened.model(zoo.tokens()).logits
    torch.testing.assert_close(here, there)
    assert talk.weights is not None
    assert talk.weights.dense_bytes > 8 * talk.weights.packed_bytes
    assert talk.weights.reason == "as asked"


def test_a_cpu_unpacks_once_if_there_is_memory(work: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert open_session(work / "out", device="cpu").weights.dense  # type: ignore[union-attr]
    monkeypatch.setattr(session, "available_memory", lambda: session.SPARE_MEMORY)
    held = open_session(work / "out", device="cpu").weights
    assert held is not None
    assert not held.dense
    assert "no memory" in held.reason


def test_a_gpu_keeps_them_packed() -> None:
    dense, reason = session._choice("auto", torch.device("cuda"), 0)
    assert not dense
    assert "weights=dense" in reason


def test_an_unknown_way_to_hold_weights_is_refused(work: Path) -> None:
    with pytest.raises(ValueError, match="expected one of auto, packed, dense"):
        open_session(work / "out", weights="sparse")


def test_a_plain_model_has_nothing_to_unpack(work: Path) -> None:
    assert open_session(work / "source", device="cpu").weights is None


def test_steps_that_cannot_be_captured_are_left_to_generate(
    work: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest
) -> None:
    plain = talker(work)
    assert "plain PyTorch" in plain.why_not_stepwise
    wanted = plain.reply("one two").answer.text
    request.getfixturevalue("library")
    talk = talker(work)
    assert talk.why_not_stepwise == ""
    assert talk.reply("one two").answer.text == wanted
    assert talk._decoder is not None

    def fails(*_: object, **__: object) -> None:
        raise RuntimeError("operation not permitted when stream is capturing\nmore")

    monkeypatch.setattr(session, "decoder_for", fails)
    talk = talker(work)
    with pytest.warns(UserWarning, match="not permitted when stream is capturing. Decoding"):
        assert talk.reply("one two").answer.text == wanted
    assert talk.reply("one").answer.text
