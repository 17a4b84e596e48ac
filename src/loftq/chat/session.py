"""A loaded model in conversation."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from loftq.chat.conversation import Conversation
from loftq.integrations.causal import CausalModel, open_causal
from loftq.integrations.decode import Decoder
from loftq.integrations.generate import Answer, Sampling, answer
from loftq.integrations.stepwise import decoder_for, why_not_stepwise
from loftq.nn import packed_layers
from loftq.report.doctor import available_memory

WEIGHTS = ("auto", "packed", "dense")
SPARE_MEMORY = 2**30
"""Bytes that dense weights must leave free, for activations and for others."""


@dataclass(frozen=True, kw_only=True)
class Reply:
    """An answer, and what became of the conversation."""

    answer: Answer
    forgotten: int
    """Turns that gave way to the context's length."""
    context_full: bool
    """Whether the answer was cut because prompt and answer fill the context."""


@dataclass(frozen=True, kw_only=True)
class Weights:
    """How the weights are held while talking."""

    dense: bool
    packed_bytes: int
    dense_bytes: int
    reason: str


class Session:
    """A model, its conversation so far, and how it answers.

    Args:
        opened: the model.
        system: instruction at the head of the conversation.
        sampling: of the first answer; the n-th draws with seed + n - 1.
        weights: how the weights are held; None for a plain model.
    """

    def __init__(
        self,
        opened: CausalModel,
        *,
        system: str | None = None,
        sampling: Sampling | None = None,
        weights: Weights | None = None,
    ) -> None:
        self.opened, self.weights = opened, weights
        self.sampling = sampling or Sampling()
        self.conversation = Conversation(opened.tokenizer, context=opened.context, system=system)
        self._answers = 0
        self._decoder: Decoder | None = None
        self.why_not_stepwise = why_not_stepwise(opened.model)
        """Reason that transformers decodes token by token, or "" if a step is one graph or call."""

    def reply(
        self,
        text: str,
        *,
        on_text: Callable[[str], object] | None = None,
        interruptible: bool = False,
    ) -> Reply:
        """Answer `text` and remember both.

        Args:
            text: what the user says.
            on_text: called with each new piece of the answer.
            interruptible: Ctrl-C ends the answer, and what was said so far is remembered.

        Raises:
            ContextError: `text` alone fills the context.
            ValueError: an empty prompt, or one that the chat template refuses.
        """
        wanted = self.sampling.max_new_tokens
        prompt = self.conversation.prompt(text, room=wanted)
        context = self.opened.context
        room = wanted if context is None else min(wanted, context - len(prompt.ids))
        sampling = replace(
            self.sampling, max_new_tokens=room, seed=self.sampling.seed + self._answers
        )
        found = answer(
            self.opened.model,
            self.opened.tokenizer,
            prompt.ids,
            sampling,
            decoder=self._decoder_for(len(prompt.ids) + room),
            on_text=on_text,
            interruptible=interruptible,
        )
        self._answers += 1
        if found.text:
            self.conversation.add(text, found.text)
        full = found.ended == "length" and room < wanted
        return Reply(answer=found, forgotten=prompt.forgotten, context_full=full)

    def _decoder_for(self, tokens: int) -> Decoder | None:
        if not self.why_not_stepwise:
            try:
                self._decoder = decoder_for(
                    self.opened.model, tokens, before=self._decoder, limit=self.opened.context
                )
            except RuntimeError as error:
                self._decoder = None
                self.why_not_stepwise = f"no step as a whole: {str(error).splitlines()[0]}"
                warnings.warn(
                    f"{self.why_not_stepwise}. Decoding by transformers' generate.", stacklevel=3
                )
        return self._decoder

    def reset(self) -> None:
        """Begin anew: no turns, and the draws of the first answer."""
        self.conversation.reset()
        self._answers = 0


def open_session(
    path: str | Path,
    *,
    adapter: str | None = None,
    device: str | None = None,
    dtype: str = "auto",
    weights: str = "auto",
    system: str | None = None,
    sampling: Sampling | None = None,
) -> Session:
    """Load a run, an output or a plain model to talk to; arguments as in `open_causal`.

    Args:
        weights: packed, dense (dequantized once, after loading) or auto: dense on a CPU with
            memory for it, packed otherwise.

    Raises:
        ValueError: as `open_causal`, or an unknown `weights`.
    """
    if weights not in WEIGHTS:
        raise ValueError(f"weights={weights}: expected one of {', '.join(WEIGHTS)}.")
    opened = open_causal(path, adapter=adapter, device=device, dtype=dtype)
    held = hold_(opened, weights) if opened.packed else None
    return Session(opened, system=system, sampling=sampling, weights=held)


def hold_(opened: CausalModel, weights: str) -> Weights:
    """Make the packed layers dense, in place, if asked to or if that is the sensible choice.

    A packed layer unpacks its weight at each forward. A GPU hardly notices; a CPU spends most of
    its time on it when it reads one token at a time.
    """
    layers = packed_layers(opened.model)
    packed = sum(p.nbytes for layer in layers.values() for p in layer.components().values())
    dense = sum(
        layer.packed_shape[0] * layer.packed_shape[1] * layer.compute_dtype.itemsize
        for layer in layers.values()
    )
    chosen, reason = _choice(weights, opened.device, dense)
    if chosen:
        for layer in layers.values():
            layer.dequantize_()
    return Weights(dense=chosen, packed_bytes=packed, dense_bytes=dense, reason=reason)


def _choice(weights: str, device: torch.device, dense: int) -> tuple[bool, str]:
    """(whether to dequantize once, why)."""
    if weights != "auto":
        return weights == "dense", "as asked"
    if device.type != "cpu":
        return False, "unpacked on the fly; weights=dense does it once"
    free = available_memory()
    if free is None or free >= dense + SPARE_MEMORY:
        return True, "unpacked once: much faster on a CPU; weights=packed saves memory"
    return False, "slow on a CPU, but no memory to unpack them once"
