"""What is trained is what the assistant said, to the token, whatever the template."""

from __future__ import annotations

import json
from itertools import groupby
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from loftq.train.data import DataSettings, prepare
from loftq.train.data.counts import Tally
from loftq.train.data.encode import Encoded, Encoder
from loftq.train.data.problems import BadRow, DataError, Place
from loftq.train.data.rendering import ChatTemplate
from loftq.train.data.samples import Chat, Completion, Document, Sample
from loftq.train.data.special import special_tokens
from loftq.train.data.templates import use_template
from tiny_tokenizers import CHATML, LETTERS, tiny

BODY = (
    "{% for m in messages %}{{ %s }}{% endfor %}{% if add_generation_prompt %}{{ %s }}{% endif %}"
)

# Without reasoning in earlier turns, and with an empty one in the last: as Qwen3 does it.
REASONING = (
    "{%- set ns = namespace(last=0) -%}{%- for m in messages -%}{%- if m.role == 'user' -%}"
    "{%- set ns.last = loop.index0 -%}{%- endif -%}{%- endfor -%}{%- for m in messages -%}"
    "{%- set text = m.content.split('</think>')[-1].lstrip('\n') -%}"
    "{{- '<|im_start|>' + m.role + '\n' -}}"
    "{%- if m.role == 'assistant' and loop.index0 > ns.last -%}"
    "{{- '<think>\n' + (m.content.split('</think>')[0].split('<think>')[-1].strip('\n') "
    "if '</think>' in m.content else (m.reasoning_content or '')) + '\n</think>\n\n' -}}"
    "{%- endif -%}"
    "{{- text + '<|im_end|>\n' -}}{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\n' -}}{%- endif -%}"
)
TEMPLATES = {
    "chatml": (CHATML, "<|im_end|>"),
    "generation": (
        "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' }}{% if m.role == 'assistant' %}"
        "{% generation %}{{ m.content + '<|im_end|>' }}{% endgeneration %}{{ '\n' }}{% else %}"
        "{{ m.content + '<|im_end|>\n' }}{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}",
        "<|im_end|>",
    ),
    "generation without the end": (
        "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' }}{% if m.role == 'assistant' %}"
        "{% generation %}{{ m.content }}{% endgeneration %}{% else %}{{ m.content }}{% endif %}"
        "{{ '<|im_end|>\n' }}{% endfor %}",
        "<|im_end|>",
    ),
    "no prompt for an answer": (
        "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}"
        "{% endfor %}",
        "<|im_end|>",
    ),
    "prompt opens a thought": (
        CHATML.replace("assistant\n' }}{% endif", "assistant\n<think>\n' }}{% endif"),
        "<|im_end|>",
    ),
    "llama 2": (
        "{% for m in messages %}{% if m.role == 'assistant' %}"
        "{{ ' ' + m.content + ' ' + eos_token }}"
        "{% else %}{{ bos_token + '[INST] ' + m.content + ' [/INST]' }}{% endif %}{% endfor %}",
        "</s>",
    ),
}  # fmt: skip


def encoded(tokenizer: Any, sample: Sample, **options: Any) -> tuple[Encoded, Tally]:
    """The one sequence of a sample."""
    choices: dict[str, Any] = {"completion_only": True, "cut": False} | options
    length = choices.pop("max_length", 100_000)
    encoder = Encoder(tokenizer, special_tokens(tokenizer), length, **choices)
    (found,) = encoder([(Place("x", 1), sample)])
    assert isinstance(found, Encoded), found
    assert len(found.ids) == len(found.mask)
    return found, encoder.tally


def parts(tokenizer: Any, found: Encoded, *, trained: bool = True) -> list[str]:
    """The text of each run of tokens that are trained, or are not."""
    text, seen = [], ""
    start = 0
    for is_trained, run in groupby(found.mask):
        start += len(list(run))
        whole = tokenizer.decode(found.ids.tolist()[:start], clean_up_tokenization_spaces=False)
        if bool(is_trained) == trained:
            text.append(whole[len(seen) :])
        seen = whole
    return text


def chat(*contents: str, **last: Any) -> Chat:
    """Turns of user and assistant in alternation."""
    roles = ("user", "assistant")
    turns = [{"role": roles[n % 2], "content": text} for n, text in enumerate(contents)]
    turns[-1] |= last
    return Chat(tuple(turns))


@pytest.mark.parametrize("style", ["bytes", "spaces"])
@pytest.mark.parametrize("name", TEMPLATES)
def test_trained_tokens_are_the_answers_with_their_ends(name: str, style: str) -> None:
    template, end = TEMPLATES[name]
    tokenizer = tiny(style, template=template)
    found, tally = encoded(tokenizer, chat("Hello there", "Fine, thanks", "assistant?", "a\n\nb"))
    trained = [text.strip().removesuffix(end).rstrip() for text in parts(tokenizer, found)]
    assert trained == ["Fine, thanks", "a\n\nb"]
    assert all(text.endswith(end) for text in parts(tokenizer, found))
    assert tally == Tally(longest=len(found.ids))


@pytest.mark.parametrize("style", ["bytes", "spaces"])
@settings(max_examples=60, deadline=None)
@given(
    contents=st.lists(
        st.text(st.sampled_from(LETTERS + "<|>"), min_size=1).filter(str.strip),
        min_size=2,
        max_size=6,
    ).filter(lambda found: len(found) % 2 == 0)
)
def test_any_answers_come_back(style: str, contents: list[str], cache: dict[str, Any]) -> None:
    tokenizer = cache.setdefault(style, tiny(style))
    found, _ = encoded(tokenizer, chat(*contents))
    answers = [text + "<|im_end|>" for text in contents[1::2]]
    for trained, answer in zip(parts(tokenizer, found), answers, strict=True):
        # A token may hold the line end before an answer and the one that the answer begins with.
        assert trained.endswith(answer)
        assert not trained.removesuffix(answer).strip("\n")


@pytest.fixture(scope="module")
def cache() -> dict[str, Any]:
    return {}


def test_an_answer_may_hold_the_prompts_words_or_its_end() -> None:
    tokenizer = tiny()
    found, _ = encoded(tokenizer, chat("b", "b", "b", "a<|im_end|>\nb", "b", "assistant\nb"))
    answers = ["b", "a<|im_end|>\nb", "assistant\nb"]
    assert parts(tokenizer, found) == [answer + "<|im_end|>" for answer in answers]


def test_reasoning_of_the_last_turn_is_trained_and_rewritten_turns_are_not() -> None:
    tokenizer = tiny(template=REASONING)
    first = "<think>\nhm\n</think>\n\nSo"
    found, tally = encoded(tokenizer, chat("a", first, "c", "<think>\nwell\n</think>\n\nYes"))
    assert parts(tokenizer, found) == ["<think>\nwell\n</think>\n\nYes<|im_end|>"]
    assert tally.rewritten == 1


def test_a_rewritten_answer_is_not_taken_for_the_same_one_later() -> None:
    tokenizer = tiny(template=REASONING)
    same = "<think>\nhm\n</think>\n\nSo"
    found, tally = encoded(tokenizer, chat("a", same, "c", same))
    assert parts(tokenizer, found) == [same + "<|im_end|>"]
    assert tally.rewritten == 1


def test_reasoning_templates_leave_plain_answers_trained() -> None:
    tokenizer = tiny(template=REASONING)
    found, tally = encoded(tokenizer, chat("a", "think", "c", "Yes"))
    assert parts(tokenizer, found) == ["think<|im_end|>", "<think>\n\n</think>\n\nYes<|im_end|>"]
    assert tally.rewritten == 0


def test_an_answer_whose_reasoning_was_dropped_is_not_trained() -> None:
    tokenizer = tiny(template=REASONING)
    turns = list(chat("a", "b", "c", "d").messages)
    turns[1] = turns[1] | {"reasoning_content": "because"}
    found, tally = encoded(tokenizer, Chat(tuple(turns)))
    assert parts(tokenizer, found) == ["<think>\n\n</think>\n\nd<|im_end|>"]
    assert tally.rewritten == 1


def test_a_template_without_an_end_gets_the_end_of_text_once_and_says_so() -> None:
    template = BODY.replace("%s", "m.role + ': ' + m.content + '\n'", 1)
    tokenizer = tiny(template=template.replace("%s", "'assistant: '"))
    found, tally = encoded(tokenizer, chat("a", "b", "c", "d"))
    assert parts(tokenizer, found)[-1].startswith("d")
    assert parts(tokenizer, found)[-1].endswith("</s>")
    assert found.ids.tolist().count(tokenizer.eos_token_id) == 1
    assert tally.ended == 1
    assert "special token" in tally.notes("x", 1)[0]


def test_turns_after_the_last_answer_are_left_out() -> None:
    tokenizer = tiny()
    found, _ = encoded(tokenizer, chat("a", "b", "never answered"))
    assert tokenizer.decode(found.ids.tolist()).endswith("assistant\nb<|im_end|>")


def test_only_the_completion_of_a_conversation_is_trained() -> None:
    tokenizer = tiny()
    turns = chat("a", "shown", "c", "learnt").messages
    found, _ = encoded(tokenizer, Chat(turns, first=3))
    assert parts(tokenizer, found) == ["learnt<|im_end|>"]


def test_without_completion_only_all_is_trained() -> None:
    tokenizer = tiny()
    found, _ = encoded(tokenizer, chat("a", "b"), completion_only=False)
    assert set(found.mask) == {1}
    assert (
        found.ids.tolist()
        == tokenizer.apply_chat_template(
            list(chat("a", "b").messages), tokenize=True, return_dict=True
        )["input_ids"]
    )


@pytest.mark.parametrize("style", ["bytes", "spaces"])
@pytest.mark.parametrize("bos", [True, False])
@pytest.mark.parametrize("start", ["", "<s>"])
def test_a_completion_ends_once_and_begins_once(style: str, bos: bool, start: str) -> None:
    tokenizer = tiny(style, bos=bos)
    found, _ = encoded(tokenizer, Completion(start + "Hello zz", " friend</s>"))
    ids = found.ids.tolist()
    assert ids.count(tokenizer.bos_token_id) == (bos or start != "")
    assert ids.count(tokenizer.eos_token_id) == 1
    assert parts(tokenizer, found) == [" friend</s>"]
    assert tokenizer.decode(ids[: found.answer]).endswith("Hello zz")


@pytest.mark.parametrize("name", ["chatml", "turns", "alpaca"])
@pytest.mark.parametrize("bos", [True, False])
def test_built_in_templates_round_trip(name: str, bos: bool) -> None:
    tokenizer = tiny(template=None, bos=bos)
    assert use_template(tokenizer, name) == f"chat template: {name}"
    turns = ({"role": "system", "content": "Be kind."}, *chat("a", "b", "c", "d").messages)
    found, tally = encoded(tokenizer, Chat(turns))
    end = "<|im_end|>" if name == "chatml" else "</s>"
    assert [text.strip() for text in parts(tokenizer, found)] == [f"b{end}", f"d{end}"]
    assert found.ids.tolist().count(tokenizer.bos_token_id) == bos
    assert tally == Tally(longest=len(found.ids))
    # What the model is given to answer is what it was trained to answer.
    prompt = tokenizer.apply_chat_template(
        list(turns[:-1]), add_generation_prompt=True, return_dict=True
    )["input_ids"]
    assert found.ids.tolist()[: found.answer] == prompt


def test_a_document_begins_and_ends_once_and_all_of_it_is_trained() -> None:
    tokenizer = tiny(bos=True)
    found, _ = encoded(tokenizer, Document("the cat"), completion_only=False)
    assert tokenizer.decode(found.ids.tolist()) == "<s>the cat</s>"
    assert set(found.mask) == {1}


FAMILIES = ("llama3", "qwen3_instruct_2507", "gemma", "gemma3", "cohere", "cohere2", "lfm2")


@pytest.mark.parametrize("family", FAMILIES)
def test_answers_are_those_that_trl_marks_in_known_templates(family: str) -> None:
    trl = pytest.importorskip("trl")
    folder = Path(trl.__file__).parent / "chat_templates"
    talk = chat("How are you?", "Fine,\n thanks", "And now?", "Still fine.")
    found = []
    for name in (family, f"{family}_training"):
        tokenizer = tiny(template=(folder / f"{name}.jinja").read_text())
        template = ChatTemplate.of(tokenizer)
        rendered = template.answers_of(talk)
        found.append([rendered.text[start:end] for start, end in rendered.answers])
    assert len(found[0]) == 2
    assert found[0] == found[1]


def test_a_last_answer_may_end_in_another_way() -> None:
    template = CHATML.replace(
        "{% if add", "{% if not add_generation_prompt %}</s>{% endif %}{% if add"
    )
    tokenizer = tiny(template=template)
    found, tally = encoded(tokenizer, chat("a", "b", "c", "d"))
    assert parts(tokenizer, found) == ["b<|im_end|>", "d<|im_end|>\n</s>"]
    assert tally == Tally(longest=len(found.ids))


def test_a_template_that_does_not_write_what_is_said_is_refused() -> None:
    template = "{% for m in messages %}{{ m.content[0].text }}<|im_end|>{% endfor %}"
    with pytest.raises(DataError, match="does not write the text of messages"):
        encoded(tiny(template=template), chat("a", "b"))


def test_what_a_template_refuses_is_a_bad_row_with_its_reason() -> None:
    template = (
        "{% if messages[0].role == 'system' %}{{ raise_exception('no system role') }}{% endif %}"
    )
    tokenizer = tiny(template=template + CHATML)
    encoder = Encoder(tokenizer, special_tokens(tokenizer), 100, completion_only=True, cut=False)
    turns = ({"role": "system", "content": "x"}, *chat("a", "b").messages)
    (found,) = encoder([(Place("f", 3, "line"), Chat(turns))])
    assert isinstance(found, BadRow)
    assert str(found) == "f, line 3: the chat template refuses it: no system role"


def test_tools_reach_the_template() -> None:
    tokenizer = tiny(template="{% if tools %}{{ tools[0].name + '\n' }}{% endif %}" + CHATML)
    found, _ = encoded(tokenizer, Chat(chat("a", "b").messages, tools=({"name": "clock"},)))
    assert tokenizer.decode(found.ids.tolist()).startswith("clock\n<|im_start|>user")
    assert parts(tokenizer, found) == ["b<|im_end|>"]


def test_smollm2_answers_come_back_from_its_own_template(models_dir: Path, tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(models_dir / "smollm2-135m")
    answers = ["Käse 日本 \U0001f600", "  two\n\nlines  ", "c"]
    rows = [
        {"messages": list(chat("q", answers[n], "r", answers[n - 1]).messages)} for n in range(3)
    ]
    path = tmp_path / "chats.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    found = prepare(str(path), tokenizer, DataSettings())
    trained = [text for text, is_trained in found.example.segments if is_trained]
    assert trained == [answers[0] + "<|im_end|>", answers[2] + "<|im_end|>"]
    for row in found.train:
        chosen = [i for i, m in zip(row["input_ids"], row["completion_mask"], strict=True) if m]
        assert tokenizer.decode(chosen).count("<|im_end|>") == 2
