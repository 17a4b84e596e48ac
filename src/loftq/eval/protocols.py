"""Three perplexities that papers print under one name; they are never to be compared.

| protocol | tokens                                          | windows            | mean over |
|----------|-------------------------------------------------|--------------------|-----------|
| gptq     | rows joined by blank lines, encoded in one piece| 2048, no overlap   | tokens    |
| paper    | each row encoded by itself, then joined         | 1024, no overlap   | tokens    |
| word     | rows joined as they are, encoded in one piece   | share one token    | words     |

`paper` is what LoftQ prints (arXiv:2310.08659): the language-modelling example of transformers,
whose tokenizer may put a special token before each row. `word` divides by the words of the text, so
that vocabularies compare; every token but the first of the text is predicted.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from loftq.eval.perplexity import window_losses, windows_of
from loftq.eval.text import encode

OnWindow = Callable[[int, int, float], object]


@dataclass(frozen=True, kw_only=True)
class Protocol:
    """How a text becomes one number."""

    context: int
    """Tokens of a window, unless another number is asked for."""
    stream: Callable[[Any, Sequence[str]], Tensor]
    """(tokenizer, rows of text) -> token ids (n,) int64."""
    by_word: bool = False
    """Windows share a token, and the sum is divided by words."""


@dataclass(frozen=True, kw_only=True)
class ProtocolResult:
    """A perplexity with everything that decides it but the model and the text."""

    protocol: str
    perplexity: float
    """exp(nll)."""
    nll: float
    """Nats per predicted token; of `word` per word."""
    tokens: int
    """Predicted tokens."""
    units: int
    """What the sum is divided by: tokens, or words."""
    context: int
    windows: tuple[float, ...]
    """Nats of each window, in order."""

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready; windows are counted."""
        return {**asdict(self), "windows": len(self.windows)}


def _joined(tokenizer: Any, rows: Sequence[str]) -> Tensor:
    return encode(tokenizer, "\n\n".join(rows))


def _each_row(tokenizer: Any, rows: Sequence[str]) -> Tensor:
    found = tokenizer(list(rows), verbose=False)["input_ids"]
    return torch.tensor([token for ids in found for token in ids], dtype=torch.int64)


def _as_it_is(tokenizer: Any, rows: Sequence[str]) -> Tensor:
    return encode(tokenizer, "".join(rows))


PROTOCOLS = {
    "gptq": Protocol(context=2048, stream=_joined),
    "paper": Protocol(context=1024, stream=_each_row),
    "word": Protocol(context=2048, stream=_as_it_is, by_word=True),
}


def protocol_perplexity(
    model: nn.Module,
    tokenizer: Any,
    rows: Sequence[str],
    name: str,
    *,
    context: int | None = None,
    windows: int | None = None,
    batch: int = 1,
    on_window: OnWindow | None = None,
) -> ProtocolResult:
    """Perplexity of a causal language model on a text, by one of the three protocols.

    Args:
        model: takes input_ids and returns an object with `logits`.
        tokenizer: its tokenizer.
        rows: of the data set, as it stores them: a line with its end, "" for a blank one.
        name: a key of PROTOCOLS.
        context: tokens of a window; None = the protocol's.
        windows: score only the first ones; None = all.
        batch: windows at a time.
        on_window: as in `perplexity`.

    Raises:
        ValueError: an unknown protocol, too little text, or a context the model was not made for.
    """
    if name not in PROTOCOLS:
        raise ValueError(f"protocol={name!r}: choose one of {', '.join(PROTOCOLS)}.")
    chosen = PROTOCOLS[name]
    ids = chosen.stream(tokenizer, rows)
    size = chosen.context if context is None else context
    if chosen.by_word:
        return _by_word(model, ids, rows, size, windows, batch, on_window)
    cut = windows_of(model, ids, size, windows)
    losses = window_losses(model, cut, batch=batch, on_window=on_window)
    tokens = len(cut) * (size - 1)
    return _result(name, losses, tokens, tokens, size)


def _by_word(
    model: nn.Module,
    ids: Tensor,
    rows: Sequence[str],
    context: int,
    windows: int | None,
    batch: int,
    on_window: OnWindow | None,
) -> ProtocolResult:
    """Windows that begin with the last token of the one before; the last one may be shorter."""
    if windows is not None:
        raise ValueError("protocol=word: scores the whole text, whose words it counts; leave out "
                         "windows.")  # fmt: skip
    windows_of(model, ids, min(context, len(ids)), None)  # refuses what cannot be scored
    step = context - 1
    whole = (len(ids) - 1) // step
    losses: list[float] = []
    if whole:
        cut = ids[: whole * step + 1].unfold(0, context, step)
        losses += window_losses(model, cut, batch=batch, on_window=on_window)
    rest = ids[whole * step :]
    if len(rest) > 1:
        losses += window_losses(model, rest[None])
    words = len("".join(rows).split())
    return _result("word", losses, len(ids) - 1, words, context)


def _result(
    name: str, losses: list[float], tokens: int, units: int, context: int
) -> ProtocolResult:
    nll = sum(losses) / units
    return ProtocolResult(
        protocol=name,
        perplexity=math.exp(nll) if nll < 700 else math.inf,
        nll=nll,
        tokens=tokens,
        units=units,
        context=context,
        windows=tuple(losses),
    )
