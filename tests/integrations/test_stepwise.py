"""Step by step the same text as `generate`: greedy, drawn, penalised, stopped."""

from typing import Any

import pytest
import torch
from torch import nn

import zoo
from loftq.integrations.cpu_decoder import CpuDecoder
from loftq.integrations.decode import GraphDecoder
from loftq.integrations.generate import Sampling, answer
from loftq.integrations.stepwise import ROOM, decoder_for, why_not_stepwise
from loftq.ops.cpu.library import ISA
from spoken import word_tokenizer

PROMPT = [6, 7, 8]


@pytest.fixture
def model() -> nn.Module:
    found = zoo.build("llama").eval()
    found.generation_config.eos_token_id = None
    return found


@pytest.mark.usefixtures("library")
@pytest.mark.parametrize("kind", [GraphDecoder, CpuDecoder])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"repetition_penalty": 1.4},
        {"temperature": 1.0, "seed": 3},
        {"temperature": 3.0, "top_p": 0.7, "repetition_penalty": 1.2, "seed": 4},
    ],
    ids=["greedy", "penalised", "drawn", "all"],
)
def test_the_text_is_that_of_generate(model: Any, options: dict[str, Any], kind: Any) -> None:
    sampling = Sampling(max_new_tokens=10, **options)
    wanted = answer(model, word_tokenizer(), PROMPT, sampling)
    decoder = kind(model, max_length=16)
    for _ in range(2):  # the second from a used cache
        found = answer(model, word_tokenizer(), PROMPT, sampling, decoder=decoder)
        assert (found.text, found.tokens, found.ended) == (wanted.text, wanted.tokens, wanted.ended)


def test_it_stops_where_generate_does(model: Any) -> None:
    sampling = Sampling(max_new_tokens=10)
    decoder = GraphDecoder(model, max_length=16)
    output = decoder.generate(torch.tensor([PROMPT]), max_new_tokens=10)[0, len(PROMPT) :].tolist()
    model.generation_config.eos_token_id = output[3]
    wanted = answer(model, word_tokenizer(), PROMPT, sampling)
    found = answer(model, word_tokenizer(), PROMPT, sampling, decoder=decoder)
    assert found.ended == wanted.ended == "stop"
    assert found.tokens == wanted.tokens == output.index(output[3]) + 1


@pytest.mark.usefixtures("library")
def test_a_decoder_serves_as_long_as_it_has_room(model: Any) -> None:
    first = decoder_for(model, 20)
    assert first.max_length == ROOM
    assert decoder_for(model, ROOM, before=first) is first
    assert decoder_for(model, ROOM + 1, before=first).max_length == 2 * ROOM
    assert decoder_for(model, 20, limit=64).max_length == 64


def test_what_speaks_against_it_is_said(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(ISA, "none")
    assert "plain PyTorch" in why_not_stepwise(model)
    scattered = zoo.build("llama")
    scattered.lm_head.to("meta")
    assert "several devices" in why_not_stepwise(scattered)


@pytest.mark.gpu
def test_a_conversation_on_a_gpu_is_captured(tmp_path: Any) -> None:
    import loftq
    from loftq.chat import open_session

    zoo.save(zoo.build("llama"), tmp_path / "source")
    word_tokenizer().save_pretrained(tmp_path / "source")
    loftq.quantize(tmp_path / "source", tmp_path / "out", rank=4, bits=2)
    sampling = Sampling(max_new_tokens=8)
    talk = open_session(tmp_path / "out", device="cuda", dtype="float32", sampling=sampling)
    assert talk.why_not_stepwise == ""
    said = [talk.reply("one two").answer.text for _ in range(2)]
    talk.reset()
    talk.why_not_stepwise, talk._decoder = "compared with generate", None
    assert [talk.reply("one two").answer.text for _ in range(2)] == said
