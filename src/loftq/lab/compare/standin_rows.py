"""Rows that stand in for the data sets of a recipe: a few of each, in the files and columns of the
real ones, about nothing."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROWS = 12
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


def _summary(document: str, summary: str) -> Callable[[int], dict[str, Any]]:
    text = " ".join
    return lambda i: {document: text(sentence(i + k) for k in range(4)), summary: sentence(i)}


def _abstract(place: int) -> dict[str, Any]:
    whole = _summary("document", "summary")(place)
    return {"id": f"d{place}", "document": whole["document"], "summaries": [whole["summary"]]}


@dataclass(frozen=True)
class Files:
    """The files of a data set and the maker of their rows."""

    names: tuple[str, ...]
    row: Callable[[int], dict[str, Any]]


def _glue(name: str, row: Callable[[int], dict[str, Any]], *validation: str) -> Files:
    splits = ("train", *(validation or ("validation",)))
    return Files(tuple(f"glue/{name}/{split}.jsonl" for split in splits), row)


_THREE = ("train", "validation", "test")
STANDINS: Mapping[str, Files] = {
    "cola": _glue("cola", _single(2)),
    "sst2": _glue("sst2", _single(2)),
    "mrpc": _glue("mrpc", _pair("sentence1", "sentence2", 2)),
    "qqp": _glue("qqp", _pair("question1", "question2", 2)),
    "stsb": _glue("stsb", _similarity),
    "mnli": _glue(
        "mnli", _pair("premise", "hypothesis", 3), "validation_matched", "validation_mismatched"
    ),
    "qnli": _glue("qnli", _pair("question", "sentence", 2)),
    "rte": _glue("rte", _pair("sentence1", "sentence2", 2)),
    "wnli": _glue("wnli", _pair("sentence1", "sentence2", 2)),
    "anli": Files(
        tuple(f"anli/{split}_r{r}.jsonl" for split in ("train", "dev", "test") for r in (1, 2, 3)),
        _pair("premise", "hypothesis", 3),
    ),
    "squad": Files(("squad/train.jsonl", "squad/validation.jsonl"), _question),
    "xquad-en": Files(("squad/xquad_en.jsonl",), _question),
    "gsm8k": Files(("gsm8k/train.jsonl", "gsm8k/test.jsonl"), _problem),
    "xsum": Files(tuple(f"xsum/{s}.jsonl" for s in _THREE), _summary("document", "summary")),
    "cnn-dailymail": Files(
        tuple(f"cnn-dailymail/{s}.jsonl" for s in _THREE), _summary("article", "highlights")
    ),
    "scitldr": Files(tuple(f"scitldr/{s}.jsonl" for s in _THREE), _abstract),
}
TEXTS = {
    "wikitext2": ("wikitext2/wiki.train.raw", "wikitext2/wiki.valid.raw", "wikitext2/wiki.test.raw")
}
LINES = 200
"""Of a text: enough for a few windows."""


def write_rows(tasks: Iterator[str] | list[str], folder: Path) -> Path:
    """Write the files of some tasks into a folder that can be used as LOFTQ_DATA.

    Raises:
        ValueError: a task that has no stand-in.
    """
    for task in tasks:
        if task not in STANDINS and task not in TEXTS:
            known = ", ".join((*STANDINS, *TEXTS))
            raise ValueError(f"{task}: no rows stand in for it. There are some for {known}.")
        for number, name in enumerate(TEXTS.get(task, ())):
            lines = "".join(f" {sentence(i + number)} \n" for i in range(LINES))
            _put(folder / name, f" = Article = \n\n{lines}")
        if task in STANDINS:
            found = STANDINS[task]
            rows = "".join(json.dumps(found.row(i)) + "\n" for i in range(ROWS))
            for name in found.names:
                _put(folder / name, rows)
    return folder


def _put(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")


def words() -> list[str]:
    """Text for a tokenizer of the rows."""
    return [sentence(i) for i in range(100)]
