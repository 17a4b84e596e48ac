"""How numbers read, and what JSON may hold."""

import json
import math

import pytest

from loftq.cli import console


@pytest.mark.parametrize(
    ("number", "text"),
    [(0, "0 B"), (999, "999 B"), (1000, "1 kB"), (78_249_000, "78.2 MB"), (999_600, "1 MB"),
     (5e9, "5 GB"), (2.5e15, "2.5e+03 TB")],
)  # fmt: skip
def test_sizes(number: float, text: str) -> None:
    assert console.size(number) == text


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0.2, "under 1 s"),
        (1.54, "1.5 s"),
        (42.4, "42 s"),
        (125, "2 min 05 s"),
        (3725, "1 h 02 min"),
    ],
)
def test_durations(seconds: float, text: str) -> None:
    assert console.duration(seconds) == text


def test_json_never_holds_what_json_lacks(capsys: pytest.CaptureFixture[str]) -> None:
    console.emit({"a": math.inf, "b": [math.nan, 1.5], "c": {"d": (1, "é")}})
    text = capsys.readouterr().out
    assert json.loads(text) == {"a": None, "b": [None, 1.5], "c": {"d": [1, "é"]}}
    assert "é" in text


def test_what_libraries_print_goes_to_stderr(capsys: pytest.CaptureFixture[str]) -> None:
    with console.answering(as_json=True):
        print("noise")
    assert capsys.readouterr() == ("", "noise\n")
