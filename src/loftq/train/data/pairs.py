"""Preferences as TRL's DPOTrainer takes them: text or messages, which it encodes itself."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from loftq.train.data.counts import Tally
from loftq.train.data.prefix import shared_length
from loftq.train.data.problems import BadRow, Place, Unusable
from loftq.train.data.rendering import ChatTemplate
from loftq.train.data.samples import Preference
from loftq.train.data.special import Special


@dataclass(frozen=True)
class Pair:
    """A preference and its size."""

    columns: dict[str, Any]
    """prompt, chosen, rejected: text, or lists of messages."""
    prompt: tuple[int, ...]
    """Token ids of the prompt."""
    tokens: int
    """Of both sequences, the prompt in each."""
    trained_tokens: int
    """Of both answers."""
    chosen: tuple[int, ...]
    """Token ids of the better answer."""


@dataclass
class PairEncoder:
    """Checks and measures preferences in batches."""

    tokenizer: Any
    special: Special
    max_length: int
    """Tokens of the prompt with an answer at most."""
    cut: bool
    """Leave what is too long to the trainer, which cuts its end; else drop it."""
    tally: Tally = field(default_factory=Tally)

    @cached_property
    def template(self) -> ChatTemplate:
        """The tokenizer's chat template; raises DataError if messages come and there is none."""
        return ChatTemplate.of(self.tokenizer)

    def __call__(self, batch: Sequence[tuple[Place, Preference]]) -> Iterator[Pair | BadRow]:
        """The pairs of a batch, in order; bad rows are those a template refuses."""
        kept: list[Preference] = []
        texts: list[str] = []
        for place, sample in batch:
            try:
                texts += self._texts(sample)
            except Unusable as error:
                yield BadRow(place, str(error))
            else:
                kept.append(sample)
        if not kept:
            return
        ids = self.tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"]
        for n, sample in enumerate(kept):
            yield from self._fitted(sample, *ids[3 * n : 3 * n + 3])

    def _texts(self, sample: Preference) -> list[str]:
        """The prompt, and the prompt with either answer."""
        if isinstance(sample.prompt, str):
            assert isinstance(sample.chosen, str)
            assert isinstance(sample.rejected, str)
            start = self.tokenizer.bos_token if self.special.bos is not None else ""
            prompt = sample.prompt if sample.prompt.startswith(start) else start + sample.prompt
            end = self.tokenizer.eos_token
            answers = (
                answer.removesuffix(end) + end for answer in (sample.chosen, sample.rejected)
            )
            return [prompt, *(prompt + answer for answer in answers)]
        wholes = [self.template.render((*sample.prompt, *answer)) for answer in _answers(sample)]
        return [self.template.render(sample.prompt, prompt=True), *wholes]

    def _fitted(
        self, sample: Preference, prompt: list[int], chosen: list[int], rejected: list[int]
    ) -> Iterator[Pair]:
        # The answers start where the rendering of either leaves the prompt's.
        start = min(shared_length(prompt, whole) for whole in (chosen, rejected))
        longest = max(len(chosen), len(rejected))
        self.tally.longest = max(self.tally.longest, longest)
        if longest > self.max_length:
            if not self.cut or start >= self.max_length:
                self.tally.dropped += 1
                return
            self.tally.truncated += 1
        sizes = [min(len(whole), self.max_length) for whole in (chosen, rejected)]
        yield Pair(
            _columns(sample),
            tuple(prompt[:start]),
            sum(sizes),
            sum(size - start for size in sizes),
            tuple(chosen[start : sizes[0]]),
        )


def _answers(sample: Preference) -> Iterator[Sequence[Any]]:
    yield sample.chosen
    yield sample.rejected


def _columns(sample: Preference) -> dict[str, Any]:
    return {
        name: value if isinstance(value, str) else [dict(message) for message in value]
        for name, value in (
            ("prompt", sample.prompt),
            ("chosen", sample.chosen),
            ("rejected", sample.rejected),
        )
    }
