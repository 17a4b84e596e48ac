"""Windows of a long context, and the span that is read back out of them."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import tiny_tasks
from loftq.tasks import TASKS, TaskError, TaskRow
from loftq.tasks.kinds.spans import LONGEST

TASK = TASKS["squad"]


@pytest.fixture
def tokenizer(model_of: Callable) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(model_of("bert"))


def rows(count: int = 3) -> list[TaskRow]:
    return [TaskRow(values=tiny_tasks.question(i), place=f"row {i}") for i in range(count)]


def test_the_labelled_tokens_of_a_window_read_as_the_answer(tokenizer: Any) -> None:
    features = TASK.encode(rows(), tokenizer, None, 96)
    assert len(features) > 3, "the context does not fit one window"
    read = set()
    for feature in features:
        first, last = feature["start_positions"], feature["end_positions"]
        assert len(feature["input_ids"]) <= 96
        if (first, last) != (0, 0):
            read.add(tokenizer.decode(feature["input_ids"][first : last + 1]).strip())
    assert read == {"answer0", "answer1", "answer2"}


def test_perfect_logits_give_the_answers_of_all_windows(tokenizer: Any) -> None:
    given = rows()
    windows = TASK._windows(given, tokenizer, 96)
    logits = []
    for feature in TASK.encode(given, tokenizer, None, 96):
        size = len(feature["input_ids"])
        starts, ends = [0.0] * size, [0.0] * size
        starts[feature["start_positions"]] += 5  # at (0, 0) it is outside the context and ignored
        ends[feature["end_positions"]] += 5
        logits.append((starts, ends))
    found = TASK._best(given, windows, logits)
    assert [text.strip() for text in found] == ["answer0", "answer1", "answer2"]
    assert TASK.score(found, given)["exact_match"].value == 1


def test_a_span_that_is_too_long_is_not_chosen(tokenizer: Any) -> None:
    given = rows(1)
    windows = TASK._windows(given, tokenizer, 256)
    (window,) = windows
    here = [i for i, span in enumerate(window["offsets"]) if span]
    assert len(here) > LONGEST
    size = len(window["offsets"])
    starts, ends = [0.0] * size, [0.0] * size
    starts[here[0]], ends[here[-1]], ends[here[2]] = 9.0, 9.0, 1.0
    (found,) = TASK._best(given, windows, [(starts, ends)])
    context = given[0].values["context"]
    assert found == context[: window["offsets"][here[2]][1]]


def test_a_question_that_leaves_no_room_is_named(tokenizer: Any) -> None:
    long = TaskRow(values=tiny_tasks.question(0) | {"question": "why " * 80}, place="file, line 7")
    with pytest.raises(TaskError, match=r"file, line 7: its question has \d+ tokens, which leaves"):
        TASK.encode([long], tokenizer, None, 64)


def test_real_questions_are_answered_by_their_own_spans(data_dir: Path, models_dir: Path) -> None:
    from transformers import AutoTokenizer

    from loftq.tasks.sources import read_split

    task = TASKS["xquad-en"]
    given = read_split(task, "test", data=data_dir)[:80]
    tokenizer = AutoTokenizer.from_pretrained(models_dir / "minilm-l6")
    features = task.encode(given, tokenizer, None, 384)
    windows = task._windows(given, tokenizer, 384)
    read = {}
    for feature, window in zip(features, windows, strict=True):
        first, last = feature["start_positions"], feature["end_positions"]
        if (first, last) != (0, 0):
            begin, end = window["offsets"][first][0], window["offsets"][last][1]
            read[window["row"]] = given[window["row"]].values["context"][begin:end]
    assert len(read) == len(given), "every answer is in one of its windows"
    assert task.score([read[i] for i in range(len(given))], given)["f1"].value > 0.99
