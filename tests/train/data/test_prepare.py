"""From a name to data sets, counts, an example and prompts."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from loftq.train.data import DataError, DataSettings, prepare
from tiny_tokenizers import tiny
from trained_run import DATA

pytest.importorskip("datasets")


def turns(number: int, words: int = 1) -> dict[str, Any]:
    answer = " ".join([f"answer {number}", *["more"] * (words - 1)])
    roles = (("user", f"question {number}"), ("assistant", answer))
    return {"messages": [{"role": role, "content": text} for role, text in roles]}


def pair(number: int) -> dict[str, str]:
    return {"prompt": f"q {number}?", "chosen": f" yes {number}", "rejected": " no"}


def write(path: Path, rows: Sequence[Any]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def answers(dataset: Any, tokenizer: Any) -> list[str]:
    """The trained text of each row."""
    return [
        tokenizer.decode(
            [i for i, m in zip(row["input_ids"], row["completion_mask"], strict=True) if m]
        )
        for row in dataset
    ]


@pytest.fixture
def chats(tmp_path: Path) -> str:
    return write(tmp_path / "chats.jsonl", [turns(n) for n in range(40)])


def test_every_row_is_trained_or_held_out_once_and_counted(chats: str) -> None:
    tokenizer = tiny()
    found = prepare(chats, tokenizer, DataSettings(max_length=200))
    train, held = answers(found.train, tokenizer), answers(found.validation, tokenizer)
    assert sorted(train + held) == sorted(f"answer {n}<|im_end|>" for n in range(40))
    counts = found.counts
    assert (counts.rows, counts.trained_rows, counts.held_out_rows) == (40, 38, 2)
    assert counts.tokens == sum(map(len, found.train["input_ids"]))
    assert counts.trained_tokens == sum(map(sum, found.train["completion_mask"]))
    assert counts.held_out_tokens == sum(map(len, found.validation["input_ids"]))
    assert (counts.truncated, counts.dropped, counts.skipped, counts.duplicates) == (0, 0, 0, 0)
    assert set(DATA) <= set(counts.to_dict())
    assert (counts.format, counts.source, found.kind) == ("messages", chats, "sft")


def test_the_same_seed_holds_out_the_same_rows(chats: str) -> None:
    def held(seed: int) -> list[str]:
        tokenizer = tiny()
        settings = DataSettings(max_length=200, holdout=0.2, seed=seed)
        return answers(prepare(chats, tokenizer, settings).validation, tokenizer)

    assert held(1) == held(1)
    assert held(1) != held(2)
    assert len(held(1)) == 8


def test_the_example_and_the_prompts_are_what_a_person_reads(chats: str) -> None:
    tokenizer = tiny()
    found = prepare(chats, tokenizer, DataSettings(max_length=200, holdout=0.2))
    ids = found.train[0]["input_ids"]
    assert found.example.text == tokenizer.decode(ids)
    assert found.example.marked.endswith("<|im_start|>assistant\n[[answer 0<|im_end|>]]")
    assert len(found.prompts) == 3
    for prompt in found.prompts:
        number = prompt.reference.removeprefix("answer ")
        assert f"question {number}" in prompt.prompt_text
        messages = turns(int(number))["messages"][:1]
        text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        assert list(prompt.prompt_ids) == tokenizer(text)["input_ids"]


def test_long_samples_are_dropped_or_cut_and_counted(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", [turns(n, words=40 if n == 3 else 1) for n in range(8)])
    dropped = prepare(path, tiny(), DataSettings(max_length=90))
    assert (dropped.counts.dropped, dropped.counts.truncated) == (1, 0)
    assert dropped.counts.trained_rows + dropped.counts.held_out_rows == 7
    assert any("1 samples longer than max_length=90" in note for note in dropped.notes)
    cut = prepare(path, tiny(), DataSettings(max_length=90, truncation="cut"))
    assert (cut.counts.dropped, cut.counts.truncated) == (0, 1)
    rows = [*cut.train["input_ids"], *cut.validation["input_ids"]]
    assert max(map(len, rows)) == 90
    short = prepare(path, tiny(), DataSettings(max_length=200, truncation="cut"))
    shorter = sorted(
        row[:90] for row in [*short.train["input_ids"], *short.validation["input_ids"]]
    )
    assert sorted(rows) == shorter


def test_when_nothing_fits_the_longest_is_named(chats: str) -> None:
    message = r"every sample is longer than max_length=8 tokens \(the longest has \d\d\)"
    with pytest.raises(DataError, match=message):
        prepare(chats, tiny(), DataSettings(max_length=8))


def test_a_text_becomes_windows_and_nothing_is_lost(tmp_path: Path) -> None:
    text = "\n\n".join(f"Paragraph {n} about the cat on the mat." for n in range(60))
    (tmp_path / "book.txt").write_text(text)
    tokenizer = tiny(bos=True)
    found = prepare(str(tmp_path / "book.txt"), tokenizer, DataSettings(max_length=64))
    assert found.counts.format == "text"
    rows = [*found.train["input_ids"], *found.validation["input_ids"]]
    assert all(row[0] == tokenizer.bos_token_id and len(row) <= 64 for row in rows)
    assert sum(row.count(tokenizer.eos_token_id) for row in rows) == 1
    assert sum(map(len, rows)) - len(rows) - 1 == len(tokenizer(text)["input_ids"]) - 1
    assert found.counts.trained_tokens == found.counts.tokens
    first = found.prompts[0]
    assert first.prompt_text
    assert first.reference


def test_a_validation_file_is_used_whole(chats: str, tmp_path: Path) -> None:
    other = write(tmp_path / "held.jsonl", [turns(n) for n in (100, 3, 101)])
    tokenizer = tiny()
    found = prepare(chats, tokenizer, DataSettings(max_length=200, limit=10), validation=other)
    assert answers(found.validation, tokenizer) == [f"answer {n}<|im_end|>" for n in (100, 3, 101)]
    counts = found.counts
    assert (counts.trained_rows, counts.held_out_rows, counts.duplicates) == (10, 3, 1)
    assert counts.validation_source == other
    assert any("1 of 3 validation samples are training samples" in note for note in found.notes)


def test_validation_of_another_kind_is_refused(chats: str, tmp_path: Path) -> None:
    other = write(tmp_path / "pairs.jsonl", [pair(1)])
    with pytest.raises(DataError, match=r"is preference data, but .* is sft data"):
        prepare(chats, tiny(), DataSettings(max_length=200), validation=other)


def test_preferences_have_the_columns_of_dpo(tmp_path: Path) -> None:
    path = write(tmp_path / "pairs.jsonl", [pair(n) for n in range(5)])
    tokenizer = tiny()
    found = prepare(path, tokenizer, DataSettings(max_length=50))
    assert found.kind == "preference"
    assert sorted(found.train.column_names) == ["chosen", "prompt", "rejected"]
    rows = [*found.train, *found.validation]
    assert sorted(rows, key=lambda row: row["prompt"]) == [pair(n) for n in range(5)]
    ends = [len(tokenizer(row["chosen"] + row["rejected"])["input_ids"]) + 2 for row in found.train]
    assert found.counts.trained_tokens == sum(ends)
    assert found.example.segments[0] == (found.train[0]["prompt"], False)
    assert found.example.segments[1] == (found.train[0]["chosen"] + "</s>", True)
    held = found.validation[0]
    assert found.prompts[0].prompt_text == held["prompt"]
    assert found.prompts[0].reference == held["chosen"].strip()


def test_preferences_over_the_length_are_dropped(tmp_path: Path) -> None:
    rows = [pair(1), pair(2), pair(3) | {"rejected": " no" * 60}]
    found = prepare(write(tmp_path / "p.jsonl", rows), tiny(), DataSettings(max_length=50))
    assert (found.counts.trained_rows, found.counts.dropped) == (1, 1)


def test_preferences_of_text_and_of_messages_do_not_mix(tmp_path: Path) -> None:
    messages = {
        name: [{"role": role, "content": name}]
        for name, role in (("prompt", "user"), ("chosen", "assistant"), ("rejected", "assistant"))
    }
    path = write(tmp_path / "p.jsonl", [pair(1), messages, pair(2), messages, pair(3), messages])
    with pytest.raises(DataError, match="some preferences are text and others messages"):
        prepare(path, tiny(), DataSettings(max_length=100))


def test_bad_rows_are_listed_together_with_their_lines(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    lines = [json.dumps(turns(n)) for n in range(10)]
    lines[2] = '{"messages": ['
    lines[5:5] = ['{"text": "x"}', *['{"messages": [{"role": "user"}]}'] * 6]
    path.write_text("\n".join(lines))
    with pytest.raises(DataError) as caught:
        prepare(str(path), tiny(), DataSettings(max_length=200, data_format="messages"))
    text = str(caught.value)
    assert text.startswith("8 rows cannot be used:")
    assert "line 3: not JSON" in text
    assert "line 6: is text, but the data is messages" in text
    assert "line 7: turn 1 of messages (user) has no content" in text
    assert "... and 3 more" in text
    assert text.endswith("leave such rows out with on_bad_rows=skip.")


def test_bad_rows_can_be_skipped_and_are_counted(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", [turns(1), {"messages": []}, turns(2), turns(3)])
    found = prepare(path, tiny(), DataSettings(max_length=200, on_bad_rows="skip"))
    assert (found.counts.rows, found.counts.skipped, found.counts.trained_rows) == (4, 1, 2)
    assert any("1 rows skipped" in note and "line 2" in note for note in found.notes)


@pytest.mark.parametrize(
    ("text", "settings", "message"),
    [
        ("", {}, "holds no rows"),
        ("\n\n", {}, "holds no rows"),
        ("nonsense\n", {}, r"none of the first 1 rows can be read:\n.*line 1: not JSON"),
        ('{"body": "x"}\n', {}, "has the columns body, which is none of the formats"),
        ('{"body": "x"}\n', {"data_format": "text", "on_bad_rows": "skip"}, "none of the 1 rows"),
        (json.dumps(turns(1)), {}, "one sample cannot be split"),
    ],
)
def test_data_that_gives_nothing_is_refused(
    tmp_path: Path, text: str, settings: dict[str, Any], message: str
) -> None:
    (tmp_path / "a.jsonl").write_text(text)
    with pytest.raises(DataError, match=message):
        prepare(str(tmp_path / "a.jsonl"), tiny(), DataSettings(max_length=200, **settings))


def test_chats_without_a_template_name_the_option_that_sets_one(chats: str) -> None:
    with pytest.raises(DataError, match=r"Set chat_template=chatml\|turns\|alpaca"):
        prepare(chats, tiny(template=None), DataSettings(max_length=200))
    tokenizer = tiny(template=None)
    found = prepare(chats, tokenizer, DataSettings(max_length=200, chat_template="turns"))
    assert "User: question 0\n\nAssistant:" in found.example.text
    assert tokenizer.chat_template
    assert "chat template: turns" in found.notes


@pytest.mark.parametrize(
    ("context", "length", "reason"),
    [(512, 512, "the model's context"), (4096, 1024, "the default"), (None, 1024, "unknown")],
)
def test_the_length_is_chosen_with_a_reason(
    chats: str, context: int | None, length: int, reason: str
) -> None:
    found = prepare(chats, tiny(), DataSettings(), model_context=context)
    assert found.counts.max_length == length
    assert any(f"max_length={length}" in note and reason in note for note in found.notes)


def test_a_length_over_the_models_context_is_refused(chats: str) -> None:
    with pytest.raises(DataError, match=r"max_length=600: the model reads 512 tokens at once"):
        prepare(chats, tiny(), DataSettings(max_length=600), model_context=512)


@pytest.mark.parametrize(
    ("choices", "message"),
    [
        ({"max_length": 4}, "max_length=4: must be at least 8"),
        ({"holdout": 0}, "holdout=0: must lie between 0 and 1"),
        ({"holdout": 1.0}, "holdout=1: must lie between"),
        ({"limit": 0}, "limit=0: must be at least 1"),
        (
            {"data_format": "csv"},
            "data_format='csv' does not exist; choose one of preference, messages",
        ),
        ({"truncation": "fold"}, "truncation='fold' does not exist; choose one of drop, cut"),
        ({"on_bad_rows": "hide"}, "on_bad_rows='hide' does not exist"),
    ],
)
def test_settings_out_of_range_are_refused(choices: dict[str, Any], message: str) -> None:
    with pytest.raises(DataError, match=message):
        DataSettings(**choices)


def test_settings_survive_a_round_trip_and_unknown_keys_do_not() -> None:
    settings = DataSettings(max_length=99, holdout=0.1, chat_template="turns")
    assert DataSettings.from_dict(json.loads(json.dumps(settings.to_dict()))) == settings
    with pytest.raises(DataError, match="unknown data option 'lenght'"):
        DataSettings.from_dict({"lenght": 3})
    with pytest.raises(DataError, match="version 9"):
        DataSettings.from_dict({"version": 9})
