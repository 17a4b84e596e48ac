import gzip
import json
from pathlib import Path

import pytest

from loftq.calibration import document_windows, read_documents, stream_windows


def letters(text: str) -> list[int]:
    return [ord(c) for c in text]


def written(path: Path, *documents: str) -> Path:
    lines = "".join(json.dumps({"text": document}) + "\n" for document in documents)
    opened = gzip.open if path.suffix == ".gz" else open
    with opened(path, "wt", encoding="utf-8") as file:
        file.write(lines)
    return path


def test_a_stream_is_cut_into_full_windows_without_padding(tmp_path: Path) -> None:
    found = stream_windows(
        written(tmp_path / "c4.jsonl.gz", "abc", "", "defg"), letters, windows=9, context=2
    )
    assert found.ids.flatten().tolist() == letters("abc\n\ndefg")[:8]
    assert found.mask.all()
    assert (found.ids.shape, found.tokens, found.source) == ((4, 2), 8, "c4.jsonl.gz")


def test_windows_are_taken_from_the_start_and_a_short_text_is_one(tmp_path: Path) -> None:
    path = tmp_path / "some.txt"
    path.write_text("abcdefg")
    assert stream_windows(path, letters, windows=2, context=2).ids.tolist() == [
        letters("ab"),
        letters("cd"),
    ]
    assert stream_windows(path, letters, windows=2, context=99).ids.tolist() == [letters("abcdefg")]


def test_documents_are_padded_and_the_padding_is_marked(tmp_path: Path) -> None:
    path = written(tmp_path / "pairs.jsonl", "abcd", "ef", "g")
    found = document_windows(path, letters, windows=2, context=3, pad=0)
    assert found.ids.tolist() == [letters("abc"), [*letters("ef"), 0]]
    assert found.mask.tolist() == [[True] * 3, [True, True, False]]
    assert found.tokens == 5


def test_a_plain_text_is_one_document_a_paragraph(tmp_path: Path) -> None:
    path = tmp_path / "some.txt"
    path.write_text("ab\n\ncde\n")
    assert document_windows(path, letters, windows=9, context=9, pad=0).mask.sum(1).tolist() == [
        2,
        3,
    ]


def test_the_fingerprint_is_that_of_the_tokens(tmp_path: Path) -> None:
    one, same, other = (
        stream_windows(written(tmp_path / f"{name}.jsonl", text), letters, windows=2, context=2)
        for name, text in (("a", "abcd"), ("b", "abcd"), ("c", "abce"))
    )
    assert one.fingerprint == same.fingerprint != other.fingerprint
    masked = document_windows(tmp_path / "a.jsonl", letters, windows=2, context=2, pad=0)
    assert masked.fingerprint != one.fingerprint


@pytest.mark.parametrize("name", ["wiki.test.raw", "test.jsonl", "stsb_test.jsonl.gz", "Test.txt"])
def test_test_splits_are_refused_by_name(tmp_path: Path, name: str) -> None:
    with pytest.raises(ValueError, match="by its name a test split"):
        read_documents(tmp_path / name)


@pytest.mark.parametrize("name", ["contest.txt", "wiki.valid.txt", "latest.txt"])
def test_other_names_are_not(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_text("text")
    assert read_documents(tmp_path / name) == ["text"]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.pdf", b"x", "suffix; expected one of"),
        ("a.txt", b" \n", "holds no text"),
        ("a.txt", b"\xff", "not UTF-8"),
        ("a.jsonl", b'{"text": "x"}\nnonsense\n', "line 2: not JSON"),
        ("a.jsonl", b'{"sentence": "x"}\n', 'line 1: no string "text"'),
    ],
)
def test_files_that_cannot_be_used_say_why(
    tmp_path: Path, name: str, content: bytes, message: str
) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=message):
        read_documents(tmp_path / name)


def test_a_text_without_tokens_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("text")
    with pytest.raises(ValueError, match="no token"):
        stream_windows(tmp_path / "a.txt", lambda text: [], windows=1, context=1)
