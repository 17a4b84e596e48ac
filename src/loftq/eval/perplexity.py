"""Perplexity by the protocol of the quantization papers (GPTQ, arXiv:2210.17323, and its code)."""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

if TYPE_CHECKING:
    from collections.abc import Iterator

PROTOCOL = "gptq"
CHUNK_ELEMENTS = 1 << 24  # logits turned into float32 at once: 64 MiB


@dataclass(frozen=True, kw_only=True)
class PerplexityResult:
    """A perplexity with everything that decides it but the model and the text."""

    perplexity: float
    """exp(nll)."""
    nll: float
    """Mean negative log-likelihood of a predicted token, in nats."""
    tokens: int
    """Predicted tokens: windows * (context - 1)."""
    windows: int
    """Windows scored, from the start of the text."""
    context: int
    """Tokens of a window."""
    protocol: str = PROTOCOL
    """gptq: joined text, windows that do not overlap, the first token of each not predicted."""

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready."""
        return asdict(self)


def perplexity(
    model: nn.Module,
    token_ids: Tensor,
    *,
    context: int = 2048,
    windows: int | None = None,
    batch: int = 1,
    on_window: Callable[[int, int, float], object] | None = None,
) -> PerplexityResult:
    """Perplexity of a causal language model on one stream of tokens.

    The stream is cut into windows of `context` tokens that do not overlap, an incomplete last one
    is dropped, and all context - 1 predictions of every window count alike. The model runs in the
    dtype and on the device it is loaded; the cross-entropy is float32, summed in float64.

    Args:
        model: takes input_ids and returns an object with `logits` (transformers, PEFT).
        token_ids: (n,) integer, n >= context.
        context: tokens of a window, at most the model's own limit.
        windows: score only the first ones; None = all.
        batch: windows at a time.
        on_window: called after each batch with (windows done, windows in all, perplexity so far).

    Raises:
        ValueError: too little text, or a context the model was not made for.
    """
    chosen = windows_of(model, token_ids, context, windows)
    total = sum(window_losses(model, chosen, batch=batch, on_window=on_window))
    tokens = len(chosen) * (context - 1)
    nll = total / tokens
    return PerplexityResult(
        perplexity=_exp(nll), nll=nll, tokens=tokens, windows=len(chosen), context=context
    )


def window_losses(
    model: nn.Module,
    windows: Tensor,
    *,
    batch: int = 1,
    on_window: Callable[[int, int, float], object] | None = None,
) -> list[float]:
    """Summed negative log-likelihood of each window in nats, its first token not predicted.

    Args:
        model: as in `perplexity`.
        windows: (n, context) integer token ids.
        batch: windows at a time.
        on_window: as in `perplexity`.
    """
    device, found = next(model.parameters()).device, []
    predicted = windows.shape[1] - 1
    with _scoring(model):
        for ids in windows.split(batch):
            ids = ids.to(device)
            logits = model(input_ids=ids, use_cache=False).logits
            found += [_nll(logits[i, :-1], ids[i, 1:]) for i in range(len(ids))]
            del logits
            if on_window is not None:
                on_window(len(found), len(windows), _exp(sum(found) / (len(found) * predicted)))
    return found


def _nll(logits: Tensor, targets: Tensor) -> float:
    """Summed cross-entropy of (positions, vocabulary) logits; float32 a few positions at a time."""
    rows = max(1, CHUNK_ELEMENTS // logits.shape[1])
    parts = [
        F.cross_entropy(part.float(), wanted, reduction="none").double().sum()
        for part, wanted in zip(logits.split(rows), targets.split(rows), strict=True)
    ]
    return float(torch.stack(parts).sum())


def windows_of(model: nn.Module, token_ids: Tensor, context: int, windows: int | None) -> Tensor:
    """(n, context): the first windows of a stream, without overlap; errors as in `perplexity`."""
    if context < 2:
        raise ValueError(f"context={context}: must be at least 2, to predict one token from one.")
    limit = longest(model)
    if limit is not None and context > limit:
        raise ValueError(
            f"context={context}: the model was made for at most {limit} tokens. Choose {limit} or "
            "fewer, and compare only with results of the same context."
        )
    found = token_ids.numel() // context
    if found < max(1, windows or 1):
        wanted = "one window" if windows is None else f"{windows} windows"
        raise ValueError(
            f"{token_ids.numel()} tokens of text give {found} windows of {context}, expected "
            f"{wanted}. Choose more text, or a smaller context or number of windows."
        )
    if windows is not None and windows < 1:
        raise ValueError(f"windows={windows}: must be at least 1; leave it out to score all.")
    count = found if windows is None else windows
    return token_ids[: count * context].view(count, context)


def longest(model: nn.Module) -> int | None:
    """Tokens that the model was made for, or None where its config does not say."""
    config: Any = getattr(model, "config", None)
    if hasattr(config, "get_text_config"):
        config = config.get_text_config()
    limit = getattr(config, "max_position_embeddings", None)
    return limit if isinstance(limit, int) and limit > 0 else None


@contextmanager
def _scoring(model: nn.Module) -> Iterator[None]:
    """No dropout and no gradients; the mode of the model is put back."""
    training = model.training
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        model.train(training)


def _exp(nll: float) -> float:
    return math.inf if nll > 700 else math.exp(nll)
