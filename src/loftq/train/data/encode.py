"""From samples to token ids, and which of them are trained."""

from __future__ import annotations

from array import array
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from loftq.train.data.counts import Tally
from loftq.train.data.problems import BadRow, Place, Unusable
from loftq.train.data.rendering import ChatTemplate, Span
from loftq.train.data.samples import Chat, Completion, Document, Sample
from loftq.train.data.special import Special
from loftq.train.data.windows import windows

CONTINUE_AFTER = 32
"""Tokens of a held-out text that are shown to the model, which then continues it."""


@dataclass(frozen=True)
class Encoded:
    """One training sequence."""

    ids: array[int]
    """Token ids, int32."""
    mask: bytes
    """1 for each token that is trained, else 0."""
    answer: int
    """Index of the token that a held-out sample is continued from: the last answer's first."""


@dataclass(frozen=True)
class Passage:
    """Text on its way to tokens."""

    text: str
    spans: tuple[Span, ...]
    """Parts that are trained, in characters."""
    is_chat: bool = False
    """A chat template has written its own first and last tokens."""
    ends: bool = True
    """Whether the end of text follows."""
    splits: bool = False
    """Whether a text that is too long becomes several sequences."""


@dataclass
class Encoder:
    """Encodes samples of fine-tuning in batches and counts what happens to them."""

    tokenizer: Any
    special: Special
    max_length: int
    """Tokens of a sequence at most."""
    completion_only: bool
    """Train on answers only, else on everything."""
    cut: bool
    """Cut what is too long, else drop it."""
    tally: Tally = field(default_factory=Tally)

    @cached_property
    def template(self) -> ChatTemplate:
        """The tokenizer's chat template; raises DataError if chats come and there is none."""
        return ChatTemplate.of(self.tokenizer)

    def __call__(self, batch: Sequence[tuple[Place, Sample]]) -> Iterator[Encoded | BadRow]:
        """The sequences of a batch of samples, in order; bad rows are those a template refuses."""
        passages = []
        for place, sample in batch:
            try:
                passages.append(self._passage(sample))
            except Unusable as error:
                yield BadRow(place, str(error))
        if not passages:
            return
        encoded = self.tokenizer(
            [passage.text for passage in passages],
            add_special_tokens=False,
            return_offsets_mapping=True,
            return_attention_mask=False,
            return_token_type_ids=False,
            verbose=False,
        )
        for passage, ids, offsets in zip(
            passages, encoded["input_ids"], encoded["offset_mapping"], strict=True
        ):
            yield from self._sequences(passage, ids, [end for _, end in offsets])

    def _passage(self, sample: Sample) -> Passage:
        if isinstance(sample, Document):
            text = sample.text
            return Passage(text, ((0, len(text)),), ends=sample.ends, splits=True)
        if isinstance(sample, Completion):
            text = sample.prompt + sample.completion
            return Passage(text, ((len(sample.prompt), len(text)),))
        assert isinstance(sample, Chat), "preferences are not encoded here"
        rendered = self.template.answers_of(sample)
        self.tally.rewritten += rendered.rewritten
        return Passage(rendered.text, rendered.answers, is_chat=True)

    def _sequences(self, passage: Passage, ids: list[int], ends: list[int]) -> Iterator[Encoded]:
        mask, answer = bytearray(len(ids)), 0
        for start, end in passage.spans:
            # A token belongs to the part it ends in: one that straddles the start carries the
            # answer's first letters. Starts are of no use: tokenizers trim spaces from them.
            first, last = bisect_right(ends, start), bisect_right(ends, end)
            mask[first:last] = b"\1" * (last - first)
            answer = first
        if passage.splits:
            yield from self._windows(passage, ids, ends)
        elif passage.is_chat:
            yield from self._fitted(*self._ended_chat(ids, mask), answer)
        else:
            begun = self._begins(ids)
            answer += len(begun) - len(ids)
            mask = bytearray(len(begun) - len(ids)) + mask
            yield from self._fitted(*self._with_end(begun, mask), answer)

    def _begins(self, ids: list[int]) -> list[int]:
        """With the token that the tokenizer starts each text with, once."""
        bos = self.special.bos
        return ids if bos is None or ids[:1] == [bos] else [bos, *ids]

    def _with_end(self, ids: list[int], mask: bytearray) -> tuple[list[int], bytearray]:
        if ids[-1:] == [self.special.eos]:
            return ids, mask
        return [*ids, self.special.eos], mask + b"\1"

    def _ended_chat(self, ids: list[int], mask: bytearray) -> tuple[list[int], bytearray]:
        """Up to the end of the last answer, which a special token must mark."""
        size = mask.rfind(1) + 1
        if size and ids[size - 1] in self.special.every:
            return (ids[:size], mask[:size]) if self.completion_only else (ids, mask)
        self.tally.ended += 1
        return self._with_end(ids[:size], mask[:size])

    def _fitted(self, ids: list[int], mask: bytearray, answer: int) -> Iterator[Encoded]:
        self.tally.longest = max(self.tally.longest, len(ids))
        kept = mask if self.completion_only else b"\1" * len(ids)
        if len(ids) > self.max_length:
            ids, kept = ids[: self.max_length], kept[: self.max_length]
            if not self.cut or 1 not in kept:
                self.tally.dropped += 1
                return
            self.tally.truncated += 1
            # What is left of the answer may be none of it: then a part of it is the prompt.
            answer = answer if answer < len(ids) else len(ids) // 2
        if 1 in kept:
            yield Encoded(array("i", ids), bytes(kept), answer)
        else:
            self.tally.dropped += 1

    def _windows(self, passage: Passage, ids: list[int], ends: list[int]) -> Iterator[Encoded]:
        """Consecutive pieces of a text, each at most max_length tokens, nothing left out."""
        room = self.max_length - (self.special.bos is not None) - 1
        pieces = windows(passage.text, ends, room)
        self.tally.split += len(pieces) > 1
        self.tally.longest = max(self.tally.longest, len(ids))
        for start, stop in pieces:
            piece = self._begins(ids[start:stop])
            if stop == len(ids) and passage.ends:
                piece, _ = self._with_end(piece, bytearray())
            answer = min(CONTINUE_AFTER, len(piece) // 2)
            yield Encoded(array("i", piece), b"\1" * len(piece), answer)
