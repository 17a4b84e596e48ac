"""What a refinement descends: outputs, hidden states and next-token distributions compared.

All in float32 over tokens under a mask (windows, context); a token outside counts nowhere.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

Head = Callable[[Tensor], Tensor]
"""Hidden states (tokens, width) -> logits (tokens, vocabulary)."""
TOKENS_AT_ONCE = 2048
"""Tokens whose logits exist at the same time, forward and backward."""
SMALLEST = torch.finfo(torch.float32).tiny


def squared_error(y_hat: Tensor, y: Tensor, mask: Tensor) -> Tensor:
    """sum ||y_hat - y||^2 / sum ||y||^2 over the tokens: ApiQ's loss up to a constant factor.

    Args:
        y_hat: (windows, context, width) or (tokens, width), any float dtype.
        y: the same shape; no gradient.
        mask: (windows, context) bool.
    """
    found, wanted = _tokens(y_hat, mask), _tokens(y, mask)
    return (found - wanted).square().sum() / wanted.square().sum().clamp_min(SMALLEST)


def hidden_error(y_hat: Tensor, y: Tensor, mask: Tensor) -> Tensor:
    """mean ||y_hat - y||^2 / ||y||^2 over the tokens, shapes as above.

    Each token counts alike. The norm of a few, above all the first, is hundreds of times that of
    the others in many decoders, and the layer norms that follow take it away.
    """
    found, wanted = _tokens(y_hat, mask), _tokens(y, mask)
    norm = wanted.square().sum(-1).clamp_min(SMALLEST)
    return ((found - wanted).square().sum(-1) / norm).mean()


def mean_divergence(h_hat: Tensor, h: Tensor, heads: tuple[Head, Head], mask: Tensor) -> Tensor:
    """Mean KL(p || p_hat) of the next token in nats, p = softmax(heads[1](h)).

    Logits exist for TOKENS_AT_ONCE tokens at a time and are made again in the backward, so that
    memory is bounded whatever the vocabulary.

    Args:
        h_hat: last hidden state (windows, context, width) of the model that learns.
        h: the original model's; no gradient.
        heads: of the model that learns and of the original one.
        mask: (windows, context) bool.
    """

    def of(found: Tensor, wanted: Tensor) -> Tensor:
        log_q = F.log_softmax(heads[0](found).float(), -1)
        with torch.no_grad():
            log_p = F.log_softmax(heads[1](wanted).float(), -1)
        return F.kl_div(log_q, log_p, log_target=True, reduction="sum")

    found, wanted = h_hat[mask], h[mask]
    return _in_chunks(of, found, wanted) / len(found)


def next_token_loss(h_hat: Tensor, ids: Tensor, head: Head, mask: Tensor) -> Tensor:
    """Mean cross-entropy in nats of each token given those before it; memory as above.

    Args:
        h_hat: last hidden state (windows, context, width).
        ids: (windows, context) int64.
        head: of the model that learns.
        mask: (windows, context) bool; both a token and the one before it must count.
    """

    def of(found: Tensor, following: Tensor) -> Tensor:
        return F.cross_entropy(head(found).float(), following, reduction="sum")

    counted = mask[:, 1:] & mask[:, :-1]
    found, following = h_hat[:, :-1][counted], ids[:, 1:][counted]
    return _in_chunks(of, found, following) / max(1, len(found))


def _in_chunks(of: Callable[[Tensor, Tensor], Tensor], a: Tensor, b: Tensor) -> Tensor:
    parts = zip(a.split(TOKENS_AT_ONCE), b.split(TOKENS_AT_ONCE), strict=True)
    return torch.stack([checkpoint(of, x, y, use_reentrant=False) for x, y in parts]).sum()


def _tokens(y: Tensor, mask: Tensor) -> Tensor:
    """Float32 rows of the tokens that count, of (windows, context, ...) or (tokens, ...)."""
    return y.reshape(mask.numel(), -1)[mask.reshape(-1)].float()
