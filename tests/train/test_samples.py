"""Answers to held-out prompts."""

from __future__ import annotations

from pathlib import Path

import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer

import tiny_chat
from loftq.train.samples import answer


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_an_answer_ends_where_the_context_does(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """GPT-2 has a table of positions, and reading beyond it is an error."""
    folder = tiny_chat.write_model(tmp_path, name)
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    context = model.config.max_position_embeddings
    monkeypatch.setattr(tokenizer, "batch_decode", lambda found, **_: [len(ids) for ids in found])
    for length, room in ((context - 5, 5), (context, 1)):
        prompts = [tokenizer.convert_tokens_to_ids(["one"] * n) for n in (length, 3)]
        assert answer(model, tokenizer, prompts, tokens=64, stop=[]) == [room, room]
