"""One answer of a causal language model, token by token: for chat, and for the samples of a run.

transformers' `generate` does the work, or a decoder of whole steps (stepwise.py). Here are
the settings that decide a text, the tokens at which an answer ends, and the text so far, passed on
as it grows.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers.generation import BaseStreamer

from loftq.integrations.decode import Decoder
from loftq.integrations.stepwise import continue_prompt

ENDED = ("stop", "length", "interrupted")
UNFINISHED = "�"
"""What a tokenizer decodes the first bytes of a character to."""
MARK = "loftqendofturn"


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """What decides the text, besides model and prompt."""

    max_new_tokens: int = 512
    """The answer is cut after so many tokens."""
    temperature: float = 0.0
    """0 takes the likeliest token each time; above 0 tokens are drawn, the flatter the higher."""
    top_p: float = 1.0
    """Draw from the likeliest tokens that hold this share of the probability."""
    repetition_penalty: float = 1.0
    """Above 1, tokens that occurred already become less likely; 1 changes nothing."""
    seed: int = 0
    """Of the draws; the global generators are left as they were."""

    def __post_init__(self) -> None:
        if self.max_new_tokens < 1:
            raise ValueError(f"max_new_tokens={self.max_new_tokens}: must be at least 1.")
        if not 0 <= self.temperature < float("inf"):
            raise ValueError(f"temperature={self.temperature}: must be 0 (greedy) or more.")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p={self.top_p}: must be above 0 and at most 1.")
        if not 0 < self.repetition_penalty < float("inf"):
            raise ValueError(f"repetition_penalty={self.repetition_penalty}: must be above 0.")


@dataclass(frozen=True, kw_only=True)
class Answer:
    """What the model said, and how fast."""

    text: str
    """Without special tokens."""
    tokens: int
    """Generated, an end-of-turn token included."""
    prompt_tokens: int
    ended: str
    """stop: the model ended it; length: max_new_tokens were generated; interrupted: Ctrl-C."""
    seconds: float
    """From the call to the last token."""
    first_seconds: float
    """From the call to the first token: reading the prompt."""

    @property
    def tokens_per_second(self) -> float | None:
        """Speed after the first token; None for fewer than two tokens."""
        after = self.seconds - self.first_seconds
        return (self.tokens - 1) / after if self.tokens > 1 and after > 0 else None


def answer(
    model: nn.Module,
    tokenizer: Any,
    prompt_ids: Sequence[int],
    sampling: Sampling | None = None,
    *,
    decoder: Decoder | None = None,
    on_text: Callable[[str], object] | None = None,
    interruptible: bool = False,
) -> Answer:
    """Continue `prompt_ids` until the model ends its turn.

    The model is put into eval mode meanwhile and back afterwards; neither its mode nor the random
    state of a training around this call changes.

    Args:
        model: a causal language model of transformers, bare or in PEFT, on any device.
        tokenizer: its tokenizer.
        prompt_ids: at least one token id, special tokens included.
        sampling: None = greedy, 512 tokens at most.
        decoder: of this model, with room for prompt and answer (stepwise.decoder_for); None leaves
            the steps to `generate`.
        on_text: called with each new piece of text; the pieces joined are `Answer.text`.
        interruptible: Ctrl-C ends the answer and returns what there is, instead of propagating.

    Raises:
        ValueError: an empty prompt.
    """
    if len(prompt_ids) == 0:
        raise ValueError("the prompt holds no token. Give it some text.")
    sampling = sampling or Sampling()
    device = next(model.parameters()).device
    prompt = torch.tensor([list(prompt_ids)], device=device)
    stops = stop_tokens(model, tokenizer)
    streamer = _Streamer(tokenizer, on_text or (lambda piece: None))
    interrupted = False
    with _evaluating(model), _drawing(sampling, device):
        try:
            if decoder is not None:
                continue_prompt(decoder, prompt, sampling, stops=stops, streamer=streamer)
            else:
                model.generate(  # type: ignore[operator]
                    input_ids=prompt,
                    attention_mask=torch.ones_like(prompt),
                    generation_config=_generation_config(sampling, stops, tokenizer),
                    streamer=streamer,
                )
            streamer.finish()
        except KeyboardInterrupt:
            if not interruptible:
                raise
            interrupted = True
    ended = "stop" if streamer.ids and streamer.ids[-1] in stops else "length"
    return Answer(
        text=streamer.text,
        tokens=len(streamer.ids),
        prompt_tokens=len(prompt_ids),
        ended="interrupted" if interrupted else ended,
        seconds=streamer.last - streamer.begun,
        first_seconds=streamer.first - streamer.begun,
    )


def stop_tokens(model: nn.Module, tokenizer: Any) -> list[int]:
    """Ids that end an answer: those of the model, the tokenizer and its chat template.

    A base model tuned on chats ends its turns as the template does, for example with <|im_end|>,
    while its generation config still names only the end of a text.
    """
    config = getattr(model, "generation_config", None)
    found = getattr(config, "eos_token_id", None)
    ids = [found] if isinstance(found, int) else list(found or ())
    ids += [tokenizer.eos_token_id, _end_of_turn(tokenizer)]
    return [*dict.fromkeys(int(x) for x in ids if x is not None)]


def _end_of_turn(tokenizer: Any) -> int | None:
    """The special token that the chat template puts right after an assistant's words, if any."""
    from jinja2 import TemplateError

    if not getattr(tokenizer, "chat_template", None):
        return None
    turns = [{"role": "user", "content": "x"}, {"role": "assistant", "content": MARK}]
    try:
        text = tokenizer.apply_chat_template(turns, tokenize=False)
    except TemplateError:  # a template of another shape; the ids of the model still count
        return None
    _, found, rest = text.rpartition(MARK)
    ids = tokenizer(rest, add_special_tokens=False)["input_ids"] if found else []
    added = tokenizer.added_tokens_decoder
    return ids[0] if ids and ids[0] in added and added[ids[0]].special else None


def _generation_config(sampling: Sampling, stops: list[int], tokenizer: Any) -> Any:
    """Every setting explicit, or the model's own generation_config.json would fill it."""
    from transformers import GenerationConfig

    draw = {"temperature": sampling.temperature, "top_p": sampling.top_p, "top_k": 0}
    pad = tokenizer.pad_token_id
    return GenerationConfig(
        max_new_tokens=sampling.max_new_tokens,
        do_sample=sampling.temperature > 0,
        num_beams=1,
        repetition_penalty=sampling.repetition_penalty,
        eos_token_id=stops or None,
        pad_token_id=pad if pad is not None else next(iter(stops), 0),
        **(draw if sampling.temperature > 0 else {}),
    )


class _Streamer(BaseStreamer):
    """Collects the ids of an answer and passes on its text as soon as it is certain.

    A character may take several tokens, and what a token decodes to depends on its neighbours.
    So each step decodes a short window twice, without and with the new token: the difference is new
    text, unless it ends in the middle of a character.
    """

    def __init__(self, tokenizer: Any, on_text: Callable[[str], object]) -> None:
        self._tokenizer, self._on_text = tokenizer, on_text
        self._window = self._read = 0
        self._has_prompt = False
        self.ids: list[int] = []
        self.text = ""
        self.begun = self.first = self.last = time.perf_counter()

    def put(self, value: Tensor) -> None:
        """Called by `generate`: once with the prompt, then with each token."""
        if not self._has_prompt:
            self._has_prompt = True
            return
        self.ids += value.flatten().tolist()
        self.last = time.perf_counter()
        if len(self.ids) == 1:
            self.first = self.last
        old, new = self._decoded(self._window, self._read), self._decoded(self._window, None)
        if len(new) > len(old) and not new.endswith(UNFINISHED):
            self._window, self._read = self._read, len(self.ids)
            self._say(new[len(old) :])

    def end(self) -> None:
        """Called by `generate`."""

    def finish(self) -> None:
        """Say what was held back, such as a character cut off by the limit."""
        old, new = self._decoded(self._window, self._read), self._decoded(self._window, None)
        self._window = self._read = len(self.ids)
        self._say(new[len(old) :])

    def _say(self, piece: str) -> None:
        if piece:
            self.text += piece
            self._on_text(piece)

    def _decoded(self, begin: int, end: int | None) -> str:
        return str(
            self._tokenizer.decode(
                self.ids[begin:end], skip_special_tokens=True, clean_up_tokenization_spaces=False
            )
        )


@contextlib.contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(training)


@contextlib.contextmanager
def _drawing(sampling: Sampling, device: torch.device) -> Iterator[None]:
    """Seed the draws of `generate`, which takes no generator, and put the old state back."""
    if sampling.temperature == 0:
        yield
        return
    devices = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices):
        torch.manual_seed(sampling.seed)
        yield
