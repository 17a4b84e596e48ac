"""What a person sees of prepared data: an example with its mask, and held-out prompts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any


@dataclass(frozen=True)
class RenderedExample:
    """A training sequence as text, in parts that are trained or not."""

    segments: tuple[tuple[str, bool], ...]
    """(text, whether it is trained), in order."""

    @property
    def text(self) -> str:
        """The whole sequence."""
        return "".join(text for text, _ in self.segments)

    @property
    def marked(self) -> str:
        """With trained parts between [[ and ]], for a terminal without colour."""
        return "".join(f"[[{text}]]" if trained else text for text, trained in self.segments)


@dataclass(frozen=True)
class HeldOut:
    """A prompt that the model has not seen, and how its answer reads in the data."""

    prompt_ids: tuple[int, ...]
    prompt_text: str
    reference: str


def rendered(tokenizer: Any, ids: Sequence[int], mask: Sequence[int]) -> RenderedExample:
    """A sequence as text, special tokens included."""
    segments, start = [], 0
    seen = ""
    for trained, run in groupby(mask):
        start += len(list(run))
        # The difference of two beginnings: a part decoded alone may lose its first space.
        text = decoded(tokenizer, ids[:start])
        segments.append((text[len(seen) :], bool(trained)))
        seen = text
    return RenderedExample(tuple(segments))


def decoded(tokenizer: Any, ids: Sequence[int], *, skip_special_tokens: bool = False) -> str:
    """The text of token ids, spaces as they are."""
    return tokenizer.decode(
        list(ids), skip_special_tokens=skip_special_tokens, clean_up_tokenization_spaces=False
    )
