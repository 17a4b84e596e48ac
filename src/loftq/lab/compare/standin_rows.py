"""Rows that stand in for the data sets of a recipe: a few of each, in the files and columns of the
real ones, about nothing."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from loftq.tasks import Task, find_task

ROWS = 24
"""Of each split."""
THINGS = ("a river", "the old mill", "a grey cat", "the baker", "some rain", "a small boat")
DEEDS = ("carries water", "stands still", "sleeps all day", "sells bread", "falls softly", "leaks")


def sentence(place: int) -> str:
    """The sentence number `place`."""
    return f"{THINGS[place % 6]} {DEEDS[(place // 2) % 6]} in year {1900 + place}."


def _single(labels: int) -> Callable[[int], dict[str, Any]]:
    return lambda i: {"sentence": sentence(i), "label": i % labels}


def _pair(first: str, second: str, labels: int) -> Callable[[int], dict[str, Any]]:
    return lambda i: {first: sentence(i), second: sentence(i + i % 3), "label": i % labels}


def _similarity(place: int) -> dict[str, Any]:
    return {**_pair("sentence1", "sentence2", 1)(place), "label": 5 * (place % ROWS) / (ROWS - 1)}


def _question(place: int) -> dict[str, Any]:
    context = " ".join(sentence(place + k) for k in range(3))
    answer = str(1901 + place)
    return {
        "id": f"q{place}",
        "title": f"Article {place // 2}",
        "context": context,
        "question": "In which year was the second thing?",
        "answers": {"text": [answer], "answer_start": [context.index(answer)]},
    }


def _problem(place: int) -> dict[str, Any]:
    total = place + 3
    reasoning = f"{place} and 3 make <<{place}+3={total}>>{total}.\n#### {total}"
    return {"question": f"Ann has {place} pears and buys 3. How many?", "answer": reasoning}


def _choice(place: int) -> dict[str, Any]:
    choices = [DEEDS[(place + k) % 6] for k in range(3)]
    turns = [f"M: {sentence(place)}", f"W: {sentence(place + 1)}"]
    row = {"dialogue_id": f"d{place // 2}", "dialogue": turns, "choice": choices}
    return {**row, "question": "What does the first thing do?", "answer": choices[place % 3]}


def _summary(document: str, summary: str) -> Callable[[int], dict[str, Any]]:
    text = " ".join
    return lambda i: {document: text(sentence(i + k) for k in range(4)), summary: sentence(i)}


def _abstract(place: int) -> dict[str, Any]:
    whole = _summary("document", "summary")(place)
    return {"id": f"d{place}", "document": whole["document"], "summaries": [whole["summary"]]}


MAKERS: Mapping[str, Callable[[int], dict[str, Any]]] = {
    "cola": _single(2),
    "sst2": _single(2),
    "mrpc": _pair("sentence1", "sentence2", 2),
    "qqp": _pair("question1", "question2", 2),
    "stsb": _similarity,
    "mnli": _pair("premise", "hypothesis", 3),
    "qnli": _pair("question", "sentence", 2),
    "rte": _pair("sentence1", "sentence2", 2),
    "wnli": _pair("sentence1", "sentence2", 2),
    "anli": _pair("premise", "hypothesis", 3),
    "dream": _choice,
    "squad": _question,
    "xquad-en": _question,
    "gsm8k": _problem,
    "gsm8k-loss": _problem,
    "xsum": _summary("document", "summary"),
    "cnn-dailymail": _summary("article", "highlights"),
    "scitldr": _abstract,
}
"""Task -> the maker of its row number i."""
ARTICLES, LINES = 4, 50
"""Of a text: enough for a few windows, and for some to be held out."""


def write_rows(tasks: Iterable[str], folder: Path) -> Path:
    """Write the files of some tasks into a folder that can be used as LOFTQ_DATA.

    Raises:
        ValueError: a task that does not exist, or has no stand-in.
    """
    for name in tasks:
        task = find_task(name)
        if name in MAKERS:
            _write_rows(task, MAKERS[name], folder)
        elif task.kind == "language":
            _write_text(task, folder)
        else:
            known = ", ".join(MAKERS)
            raise ValueError(f"{name}: no rows stand in for it. There are some for {known}.")
    return folder


def _write_rows(task: Task, make: Callable[[int], dict[str, Any]], folder: Path) -> None:
    splits = task.splits
    names = (*splits.train, *splits.validation, *splits.test)
    one_file = splits.first is not None  # split by the values of a column
    count = ROWS if splits.first is None else 3 * splits.first
    rows = "".join(json.dumps(make(i)) + "\n" for i in range(count))
    for name in dict.fromkeys(names):
        _put(folder / (f"{task.local}.jsonl" if one_file else f"{task.local}/{name}.jsonl"), rows)


def _write_text(task: Task, folder: Path) -> None:
    for number, name in enumerate(task.files.values()):
        lines = "".join(f" {sentence(i + number)} \n" for i in range(LINES))
        text = "".join(f" = Article {k} = \n\n{lines}\n" for k in range(ARTICLES))
        _put(folder / task.local / f"{name}.raw", text)


def _put(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")


def words() -> list[str]:
    """Text for a tokenizer of the rows."""
    return [sentence(i) for i in range(100)]
