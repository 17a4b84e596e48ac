"""Journal: a torn last line is forgotten, any other damage is refused."""

from __future__ import annotations

import errno
import os
from pathlib import Path
from typing import Any

import pytest

from loftq.checkpoint import CheckpointError
from loftq.checkpoint.journal import Journal

HEAD = {"fingerprint": "f", "layout": "l", "describe": {"bits": 2, "name": "é"}}


def written(path: Path) -> bytes:
    journal = Journal.create(path, HEAD)
    journal.append("one", {"a": "1"}, {"error": 0.1})
    journal.append("two", {"b": "2"}, {"error": float("inf")})
    journal.close()
    return path.read_bytes()


def test_reopened_journal_equals_the_written_one(tmp_path: Path) -> None:
    written(tmp_path / "j")
    journal = Journal.load(tmp_path / "j")
    journal.check(HEAD)
    assert journal.records == {"one": {"error": 0.1}, "two": {"error": float("inf")}}
    assert journal.hashes == {"a": "1", "b": "2"}
    assert not journal.finishing
    journal.mark_finishing()
    journal.mark_finishing()
    journal.close()
    assert Journal.load(tmp_path / "j").finishing
    assert (tmp_path / "j").read_bytes().count(b"\n") == 4


def test_line_torn_anywhere_is_dropped_and_overwritten(tmp_path: Path) -> None:
    whole = written(tmp_path / "j")
    last = whole.rindex(b"\n", 0, -1) + 1
    for cut in range(last, len(whole)):
        for junk in (b"", b"\0" * 7, b"\0\0\n"):
            (tmp_path / "j").write_bytes(whole[:cut] + junk)
            if cut == last and junk == b"":
                continue
            journal = Journal.load(tmp_path / "j")
            assert list(journal.records) == ["one"], (cut, junk)
            journal.append("two", {"b": "2"}, {"error": float("inf")})
            journal.close()
            assert (tmp_path / "j").read_bytes() == whole


def test_damage_before_the_last_line_is_refused(tmp_path: Path) -> None:
    whole = written(tmp_path / "j")
    for old, new, number in ((b'{"journal"', b'["journal"', 1), (b'{"batch":"one"', b"{", 2)):
        (tmp_path / "j").write_bytes(whole.replace(old, new))
        with pytest.raises(CheckpointError, match=f"line {number} is damaged. Delete"):
            Journal.load(tmp_path / "j")


@pytest.mark.parametrize("content", [b"", b"{}\n", b'{"journal":2}\n'])
def test_other_file_or_version_is_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "j").write_bytes(content)
    with pytest.raises(CheckpointError, match="not a journal of version 1"):
        Journal.load(tmp_path / "j")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"fingerprint": "g"}, "fingerprint: 'f' then, 'g' now"),
        ({"layout": "m"}, "layout: 'l' then, 'm' now"),
        ({"describe": {"bits": 3, "name": "é"}}, r"\(bits: 2 then, 3 now\)"),
        ({"describe": {"bits": 2}}, "name: 'é' then, None now"),
    ],
)
def test_another_run_is_refused_with_the_difference(
    tmp_path: Path, change: dict[str, Any], message: str
) -> None:
    written(tmp_path / "j")
    with pytest.raises(CheckpointError, match=message):
        Journal.load(tmp_path / "j").check(HEAD | change)


def test_failed_append_leaves_a_journal_that_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    journal = Journal.create(tmp_path / "j", HEAD)
    journal.append("one", {"a": "1"}, {"error": 0.1})
    real = os.pwrite

    def half(descriptor: int, data: memoryview, offset: int) -> int:
        real(descriptor, data[: len(data) // 2], offset)
        raise OSError(errno.ENOSPC, "full")

    with monkeypatch.context() as patch:
        patch.setattr(os, "pwrite", half)
        with pytest.raises(CheckpointError, match="bytes needed"):
            journal.append("other", {"c": "3"}, {"long": "x" * 500})
    assert list(journal.records) == ["one"]
    journal.append("two", {"b": "2"}, {"error": float("inf")})
    assert list(Journal.load(tmp_path / "j").records) == ["one", "two"]
