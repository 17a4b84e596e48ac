"""The three perplexities: what each joins, cuts and divides by."""

import math
from typing import Any

import pytest
import torch

import packed_folder
import tiny_tokenizers
from loftq.eval import PROTOCOLS, encode, perplexity, protocol_perplexity

ROWS = ["", " = Cats = \n", "", " The cat sat on the mat .\n", " And thought .\n"] * 8


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return tiny_tokenizers.tiny(bos=True)


@pytest.fixture(scope="module")
def model(tokenizer: Any) -> Any:
    model = packed_folder.tiny_llama()
    model.resize_token_embeddings(len(tokenizer))
    return model


def test_gptq_is_the_stream_joined_by_blank_lines(model: Any, tokenizer: Any) -> None:
    found = protocol_perplexity(model, tokenizer, ROWS, "gptq", context=16)
    ours = perplexity(model, encode(tokenizer, "\n\n".join(ROWS)), context=16)
    assert found.perplexity == pytest.approx(ours.perplexity)
    assert (found.tokens, len(found.windows)) == (ours.tokens, ours.windows)
    assert found.units == found.tokens


def test_paper_encodes_each_row_by_itself(model: Any, tokenizer: Any) -> None:
    ids = PROTOCOLS["paper"].stream(tokenizer, ROWS)
    assert ids.tolist() == [i for row in ROWS for i in tokenizer(row)["input_ids"]]
    starts = (ids == tokenizer.bos_token_id).sum()
    assert starts == len(ROWS), "a special token before each row, as the tokenizer puts it"
    found = protocol_perplexity(model, tokenizer, ROWS, "paper", context=16)
    assert found.perplexity == pytest.approx(perplexity(model, ids, context=16).perplexity)


def test_word_predicts_every_token_but_the_first_and_divides_by_words(
    model: Any, tokenizer: Any
) -> None:
    ids = encode(tokenizer, "".join(ROWS))
    found = protocol_perplexity(model, tokenizer, ROWS, "word", context=16)
    assert found.tokens == len(ids) - 1
    assert found.units == len("".join(ROWS).split())
    total, step = 0.0, 15
    for start in range(0, len(ids) - 1, step):
        window = ids[start : start + step + 1][None]
        logits = model(input_ids=window).logits[0, :-1]
        loss = torch.nn.functional.cross_entropy(logits, window[0, 1:], reduction="sum")
        total += loss.item()
    assert found.nll == pytest.approx(total / found.units, rel=1e-5)
    assert found.perplexity == pytest.approx(math.exp(found.nll))


def test_the_context_is_the_protocols(model: Any, tokenizer: Any) -> None:
    assert (PROTOCOLS["gptq"].context, PROTOCOLS["paper"].context) == (2048, 1024)
    with pytest.raises(ValueError, match="context=1024: the model was made for at most 64 tokens"):
        protocol_perplexity(model, tokenizer, ROWS, "paper")


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("c4", {}, "protocol='c4': choose one of gptq, paper, word"),
        ("word", {"windows": 2}, "scores the whole text"),
        ("gptq", {"context": 65}, "made for at most 64 tokens"),
        ("word", {"context": 1}, "must be at least 2"),
        ("gptq", {"context": 16, "windows": 10_000}, "expected 10000 windows"),
    ],
)
def test_what_cannot_be_scored_is_refused(
    model: Any, tokenizer: Any, name: str, options: dict, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        protocol_perplexity(model, tokenizer, ROWS, name, **options)
