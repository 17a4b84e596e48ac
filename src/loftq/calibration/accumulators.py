"""Statistics of the inputs of a layer, summed token by token.

Means are over tokens, without the factor 2 that GPTQ's code carries:

    mean square    E[x_i^2]                 (in_features,) float64
    largest mean   max_windows mean |x_i|   (in_features,) float64, which LQER weighs by
    gram           E[x x^T]                 (in_features, in_features) float32

Squares are summed in float64. A Gram is summed in float32: each chunk is one float32 product (never
TF32 or less), and what its rounding leaves, about 1e-7 of the largest element, lies far below any
damping. Layers that read the very same tensor share one accumulator.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch
from torch import Tensor

KINDS = ("none", "diagonal", "gram")
"""What a method may need, in rising order: whoever has a Gram has the diagonal."""


@dataclass(frozen=True, kw_only=True)
class InputStatistics:
    """What is known of the inputs of one layer."""

    mean_square: Tensor
    """E[x_i^2], (in_features,) float64."""
    largest_mean: Tensor
    """Largest mean of |x_i| over a window, (in_features,) float64."""
    gram: Tensor | None
    """E[x x^T], (in_features, in_features) float32, or None where only the diagonal was taken."""
    tokens: int
    """Tokens counted."""
    dropped: int = 0
    """Tokens left out because an input of theirs was NaN or infinite."""
    drift: Tensor | None = None
    """E[(x - x_hat) x_hat^T], (in_features, in_features) float32, where all the rest is of the
    inputs x_hat of a model quantized so far and x are those of the original (sequence.py)."""


class Accumulator:
    """Sums over the tokens seen so far.

    Args:
        in_features: width of the inputs.
        kind: "diagonal" or "gram".
        device: where the sums are kept.
    """

    def __init__(self, in_features: int, kind: str, device: torch.device) -> None:
        assert kind in KINDS[1:], kind
        self.tokens = self.dropped = 0
        self.squares = torch.zeros(in_features, dtype=torch.float64, device=device)
        self.largest = torch.zeros_like(self.squares)
        self.products: Tensor | None = None
        if kind == "gram":
            self.products = torch.zeros(in_features, in_features, device=device)

    def add(self, x: Tensor) -> None:
        """Count the tokens of one window, x (tokens, in_features) of any float dtype.

        A token with a value that is not finite is left out whole and counted in `dropped`.
        """
        x = x.float()
        finite = torch.isfinite(x).all(-1)
        if not finite.all():
            self.dropped += int((~finite).sum())
            x = x[finite]
        if not len(x):
            return
        self.tokens += len(x)
        mean = x.abs().sum(0, dtype=torch.float64) / len(x)
        self.largest = torch.maximum(self.largest, mean)
        self.squares += x.square().sum(0, dtype=torch.float64)
        if self.products is not None:
            with _full_float32(x.device):
                self.products.addmm_(x.mT, x)

    def result(self) -> InputStatistics:
        """The means, on the CPU.

        Raises:
            ValueError: no token was counted.
        """
        if not self.tokens:
            raise ValueError(f"no finite input among {self.dropped} tokens")
        gram = None
        if self.products is not None:  # a float32 product is symmetric only up to rounding
            lower = (self.products / self.tokens).cpu().tril()
            gram = lower + lower.tril(-1).mT
        return InputStatistics(
            mean_square=(self.squares / self.tokens).cpu(),
            largest_mean=self.largest.cpu(),
            gram=gram,
            tokens=self.tokens,
            dropped=self.dropped,
        )


class PairAccumulator:
    """Sums over pairs of inputs: x of the original model, x_hat of the quantized one.

    Args:
        in_features: width of the inputs.
        device: where the sums are kept.
    """

    def __init__(self, in_features: int, device: torch.device) -> None:
        self.own = Accumulator(in_features, "gram", device)
        self.dropped = 0
        self.drift = torch.zeros(in_features, in_features, device=device)

    def add(self, x: Tensor, x_hat: Tensor) -> None:
        """Count the tokens of one window, both (tokens, in_features) of any float dtype.

        A token with a value that is not finite in either is left out whole and counted.
        """
        x, x_hat = x.float(), x_hat.float()
        finite = torch.isfinite(x).all(-1) & torch.isfinite(x_hat).all(-1)
        if not finite.all():
            self.dropped += int((~finite).sum())
            x, x_hat = x[finite], x_hat[finite]
        self.own.add(x_hat)
        with _full_float32(x.device):
            self.drift.addmm_((x - x_hat).mT, x_hat)

    def result(self) -> InputStatistics:
        """The means of x_hat and the drift, on the CPU.

        Raises:
            ValueError: no token was counted.
        """
        if not self.own.tokens:
            raise ValueError(f"no finite input among {self.dropped} tokens")
        drift = (self.drift / self.own.tokens).cpu()
        return replace(self.own.result(), dropped=self.dropped, drift=drift)


@contextmanager
def _full_float32(device: torch.device) -> Iterator[None]:
    """Float32 products in float32, whatever precision the process allows for its own."""
    if device.type != "cuda":
        yield
        return
    products = torch.backends.cuda.matmul
    before, products.fp32_precision = products.fp32_precision, "ieee"
    try:
        yield
    finally:
        products.fp32_precision = before
