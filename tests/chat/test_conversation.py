"""The tokens of a conversation, and what it forgets when it grows too long."""

from typing import Any

import pytest

from loftq.chat import ContextError, Conversation
from spoken import NO_SYSTEM, TEMPLATE, word_tokenizer


def said(tokenizer: Any, ids: list[int]) -> str:
    return tokenizer.decode(ids)


def test_all_turns_and_the_system_stand_before_the_question() -> None:
    tokenizer = word_tokenizer()
    talk = Conversation(tokenizer, system="ten")
    talk.add("one", "two")
    text = said(tokenizer, talk.prompt("three", room=5).ids)
    marks = [word for word in text.split() if not word.startswith("<|")]
    assert " ".join(marks) == "system ten user one assistant two user three assistant"


def test_a_reset_forgets_the_turns_and_keeps_the_system() -> None:
    talk = Conversation(word_tokenizer(), system="ten")
    first = talk.prompt("one", room=5).ids
    talk.add("one", "two")
    assert talk.prompt("one", room=5).ids != first
    talk.reset()
    assert talk.prompt("one", room=5).ids == first


def test_the_oldest_turns_give_way() -> None:
    tokenizer = word_tokenizer()
    long, short = Conversation(tokenizer), Conversation(tokenizer, context=40)
    for talk in (long, short):
        for _ in range(4):
            talk.add("one two three", "four")
        talk.add("five", "six")
    assert long.prompt("seven", room=100).forgotten == 0
    prompt = short.prompt("seven", room=100)
    assert prompt.forgotten == len(long.turns) - len(short.turns) > 0
    assert short.turns[-1] == ("five", "six")
    assert len(prompt.ids) <= 30  # a quarter stays free for the answer
    assert len(short.prompt("seven", room=2).ids) <= 38


def test_one_question_that_is_too_long_is_refused() -> None:
    talk = Conversation(word_tokenizer(), context=8)
    talk.add("one", "two")
    with pytest.raises(ContextError, match="made for 8, answer included"):
        talk.prompt("one " * 9, room=1)


def test_without_a_template_the_text_is_continued_and_nothing_is_remembered() -> None:
    tokenizer = word_tokenizer(None)
    talk = Conversation(tokenizer)
    talk.add("one", "two")
    assert talk.turns == []
    assert said(tokenizer, talk.prompt("three four", room=1).ids) == "three four"


def test_a_text_that_the_tokenizer_closed_is_opened_again() -> None:
    from tokenizers.processors import TemplateProcessing

    tokenizer = word_tokenizer(None)
    closing = TemplateProcessing(single="$A <eos>", special_tokens=[("<eos>", 2)])
    tokenizer.backend_tokenizer.post_processor = closing
    assert tokenizer("one")["input_ids"][-1] == 2
    assert 2 not in Conversation(tokenizer).prompt("one", room=1).ids


def test_a_system_needs_a_template() -> None:
    with pytest.raises(ValueError, match="no chat template, so there is no place"):
        Conversation(word_tokenizer(None), system="ten")


def test_a_template_that_refuses_says_why() -> None:
    talk = Conversation(word_tokenizer(NO_SYSTEM + TEMPLATE), system="ten")
    with pytest.raises(ValueError, match=r"no system role.*Leave system"):
        talk.prompt("one", room=1)
