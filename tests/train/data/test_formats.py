"""Every format is recognised, means what it says, and is refused with a reason."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from loftq.train.data.formats import FORMATS, detect, format_of, sample_of
from loftq.train.data.problems import DataError, Place, Unusable
from loftq.train.data.samples import Chat, Completion, Document, Preference, Sample

USER = {"role": "user", "content": "a"}
BOT = {"role": "assistant", "content": "b"}
OTHER = {"role": "assistant", "content": "c"}
SYSTEM = {"role": "system", "content": "s"}
TOOL = {"name": "clock"}

ROWS: list[tuple[str, dict[str, Any], Sample]] = [
    ("messages", {"messages": [SYSTEM, USER, BOT]}, Chat((SYSTEM, USER, BOT))),
    ("messages", {"conversations": [USER, BOT], "id": 7}, Chat((USER, BOT))),
    (
        "messages",
        {"messages": [USER, BOT], "tools": '[{"name": "clock"}]'},
        Chat((USER, BOT), (TOOL,)),
    ),
    (
        "messages",
        {"messages": [{"role": "system", "content": ""}, USER | {"name": None}, BOT]},
        Chat((USER, BOT)),
    ),
    (
        "messages",
        {"messages": [USER | {"content": [{"type": "text", "text": "a"}]}, BOT]},
        Chat((USER, BOT)),
    ),
    (
        "messages",
        {"messages": [USER, {"role": "assistant", "tool_calls": [TOOL]}, BOT]},
        Chat((USER, {"role": "assistant", "tool_calls": [TOOL], "content": ""}, BOT)),
    ),
    (
        "sharegpt",
        {
            "system": "s",
            "conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}],
        },
        Chat((SYSTEM, USER, BOT)),
    ),
    ("alpaca", {"instruction": "a", "input": "", "output": "b"}, Chat((USER, BOT))),
    (
        "alpaca",
        {"instruction": "a", "input": "x", "output": "b"},
        Chat((USER | {"content": "a\n\nx"}, BOT)),
    ),
    ("prompt-completion", {"prompt": "a", "completion": " b"}, Completion("a", " b")),
    (
        "prompt-completion",
        {"prompt": [{"role": "system", "content": ""}, USER, BOT, USER], "completion": [OTHER]},
        Chat((USER, BOT, USER, OTHER), first=3),
    ),
    ("text", {"text": "a"}, Document("a")),
    ("preference", {"prompt": "a", "chosen": "b", "rejected": "c"}, Preference("a", "b", "c")),
    (
        "preference",
        {"prompt": [USER], "chosen": [BOT], "rejected": [OTHER]},
        Preference((USER,), (BOT,), (OTHER,)),
    ),
    (
        "preference",
        {"prompt": "a", "chosen": [USER, BOT], "rejected": [USER, OTHER]},
        Preference((USER,), (BOT,), (OTHER,)),
    ),
    (
        "preference",
        {"prompt": "a", "chosen": [BOT], "rejected": [OTHER]},
        Preference((USER,), (BOT,), (OTHER,)),
    ),
    (
        "preference",
        {"chosen": "Human: a\n\nAssistant: the cat", "rejected": "Human: a\n\nAssistant: them"},
        Preference("Human: a\n\nAssistant: ", "the cat", "them"),
    ),
]  # fmt: skip


def placed(*rows: dict[str, Any]) -> list[tuple[Place, dict[str, Any]]]:
    return [(Place("f.jsonl", n, "line"), row) for n, row in enumerate(rows, 1)]


@pytest.mark.parametrize(("name", "row", "meaning"), ROWS)
def test_a_row_is_recognised_and_means_this(
    name: str, row: dict[str, Any], meaning: Sample
) -> None:
    found = detect(placed(row))
    assert found.name == name
    assert sample_of(row, found) == meaning


@given(
    st.sampled_from(ROWS),
    st.dictionaries(st.sampled_from(["id", "source", "label", "n"]), st.integers()),
    st.lists(st.just({"body": "x"}), max_size=3),
)
def test_other_columns_and_misfits_do_not_change_what_is_detected(
    known: tuple[str, dict[str, Any], Sample],
    others: dict[str, int],
    misfits: list[dict[str, str]],
) -> None:
    name, row, meaning = known
    found = detect(placed(*misfits, others | row))
    assert found.name == name
    assert sample_of(others | row, found) == meaning


@given(st.dictionaries(st.text(), st.none() | st.integers() | st.text() | st.lists(st.integers())))
def test_any_row_is_a_sample_or_says_why_not(row: dict[str, Any]) -> None:
    for known in FORMATS.values():
        try:
            found: object = sample_of(row, known)
        except Unusable as error:
            found = str(error)
        assert found
        assert isinstance(found, str) or known.fits(row)


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"messages": [USER]}, "no turn of the assistant"),
        ({"messages": [{"role": "bot", "content": "x"}, BOT]}, "turn 1 .* role 'bot'; expected"),
        ({"messages": [USER, BOT | {"content": " "}]}, r"turn 2 of messages \(assistant\) has no"),
        ({"messages": [USER, BOT | {"content": None}]}, "has no content"),
        ({"messages": [USER, "hello", BOT]}, 'turn 2 of messages is text; expected an object with'),
        ({"messages": [USER | {"content": [{"type": "image"}]}, BOT]}, "holds image; only text"),
        ({"messages": [USER | {"content": 3}, BOT]}, "holds a number; only text"),
        ({"messages": [USER, BOT], "tools": "{"}, '"tools" is not JSON'),
        ({"messages": [USER, BOT], "tools": [1]}, '"tools" is not a list of JSON schemas'),
        ({"conversations": [{"from": "alien", "value": "x"}]}, "from 'alien'; expected one of"),
        ({"conversations": [{"from": "gpt", "value": "x"}, {"from": "gpt"}]}, "turn 2 is an obj"),
        ({"instruction": "a", "output": ""}, '"output" is empty'),
        ({"instruction": 3, "output": "x"}, '"instruction" is a number; expected text'),
        ({"prompt": "a", "completion": [BOT]}, '"prompt" is text; expected a list of messages'),
        ({"prompt": [USER], "completion": [USER]}, "no turn of the assistant"),
        ({"text": "  "}, '"text" is empty'),
        ({"prompt": "a", "chosen": "b", "rejected": "b"}, "are the same"),
        ({"chosen": "cat", "rejected": "dog"}, "begin with no words in common"),
        ({"chosen": "a cat\n", "rejected": "a cat\nsat"}, "beginning of the other"),
        ({"chosen": [BOT], "rejected": [OTHER]}, "no first message in common"),
        ({"chosen": [USER, BOT], "rejected": [USER, USER]}, '"rejected" has no turn of the assist'),
    ],
)  # fmt: skip
def test_a_row_that_cannot_be_trained_on_says_why(row: dict[str, Any], reason: str) -> None:
    found = format_of(row)
    assert found is not None
    with pytest.raises(Unusable, match=reason):
        sample_of(row, found)


def test_a_row_of_another_format_is_named() -> None:
    with pytest.raises(Unusable, match=r"is text, but the data is alpaca"):
        sample_of({"text": "x"}, FORMATS["alpaca"])
    with pytest.raises(Unusable, match=r"has the columns body; expected \{\"text\"\}"):
        sample_of({"body": "x"}, FORMATS["text"])


def test_mixed_formats_are_refused_with_counts_and_lines() -> None:
    rows = placed({"text": "x"}, {"prompt": "a", "completion": "b"}, {"text": "y"})
    message = r"text \(2 rows, f\.jsonl, line 1\); prompt-completion \(1 rows, f\.jsonl, line 2\)"
    with pytest.raises(DataError, match=message):
        detect(rows)


def test_rows_of_no_format_are_told_which_there_are() -> None:
    with pytest.raises(DataError, match=r"line 1: has the columns question, answer, which is none"):
        detect(placed({"question": "a", "answer": "b"}))
