"""Long texts are cut where a reader would pause, and nothing is lost."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from loftq.train.data.windows import windows


@given(st.text("ab \n", max_size=200), st.integers(1, 30))
def test_windows_are_consecutive_complete_and_short(text: str, size: int) -> None:
    found = windows(text, range(1, len(text) + 1), size)
    assert [start for start, _ in found] == [0, *(stop for _, stop in found)][: len(found)]
    assert sum(stop - start for start, stop in found) == len(text)
    assert all(0 < stop - start <= size for start, stop in found)


@pytest.mark.parametrize(
    ("text", "pieces"),
    [
        ("aaaa\n\nbbbb\ncc", ["aaaa\n\n", "bbbb\ncc"]),
        ("aaaa\nbbbbbb", ["aaaa\n", "bbbbbb"]),
        ("aaaaaaaabbb", ["aaaaaaaa", "bbb"]),
        ("a\n\nbbbbbbbbbb", ["a\n\nbbbbb", "bbbbb"]),
        ("aaaaaaaa", ["aaaaaaaa"]),
        ("", []),
    ],
)
def test_a_piece_ends_with_a_paragraph_else_a_line_else_full(text: str, pieces: list[str]) -> None:
    found = windows(text, range(1, len(text) + 1), 8)
    assert [text[start:stop] for start, stop in found] == pieces


def test_a_size_of_nothing_is_refused() -> None:
    with pytest.raises(ValueError, match="size=0"):
        windows("a", [1], 0)
