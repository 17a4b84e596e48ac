"""Statistics of the inputs of a layer, summed over tokens.

Means are over tokens, without the factor 2 that GPTQ's code carries:

    mean square    E[x_i^2]                 (in_features,) float64
    largest mean   max_windows mean |x_i|   (in_features,) float64, which LQER weighs by
    gram           E[x x^T]                 (in_features, in_features) float32

Squares are summed in float64. A Gram is summed in float32 (never TF32 or less), and what its
rounding leaves, about 1e-7 of the largest element, lies far below any damping. Products of float16
and bfloat16 inputs are exact in float32, so a GPU forms them on its matrix units. Layers that read
the very same tensor share one accumulator. No sum makes a GPU wait for the host.
"""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor

from loftq.ops.panels import add_product_
from loftq.ops.precision import full_float32

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
    fisher_rows: Tensor | None = None
    """Row means of the weight's Fisher diagonal, (out_features,) float64; see fisher.py."""
    fisher_columns: Tensor | None = None
    """Its column means, (in_features,) float64."""
    drift: Tensor | None = None
    """E[(x - x_hat) x_hat^T], (in_features, in_features) float32, where all the rest is of the
    inputs x_hat of a model quantized so far and x are those of the original (sequence.py)."""

    def to(self, device: torch.device | str) -> InputStatistics:
        """The same on a device."""
        held: dict[str, Any] = {field.name: getattr(self, field.name) for field in fields(self)}
        tensors = {name: x.to(device) for name, x in held.items() if isinstance(x, Tensor)}
        return InputStatistics(**held | tensors)


class Accumulator:
    """Sums over the tokens seen so far.

    Args:
        in_features: width of the inputs.
        kind: "diagonal" or "gram".
        device: where the sums are kept.
    """

    def __init__(self, in_features: int, kind: str, device: torch.device) -> None:
        assert kind in KINDS[1:], kind
        self.tokens = torch.zeros((), dtype=torch.int64, device=device)
        self.dropped = torch.zeros_like(self.tokens)
        self.squares = torch.zeros(in_features, dtype=torch.float64, device=device)
        self.largest = torch.zeros_like(self.squares)
        self.products: Tensor | None = None
        if kind == "gram":
            self.products = torch.zeros(in_features, in_features, device=device)

    def add(self, x: Tensor, mask: Tensor | None = None) -> None:
        """Count the tokens of some windows.

        A token with a value that is not finite is left out whole and counted in `dropped`.

        Args:
            x: (windows, tokens, in_features), or (tokens, in_features) of one; any float dtype.
            mask: bool (windows, tokens), false where a token is padding; None = all count.
        """
        x = x.reshape(-1, *x.shape[-2:])
        counted = torch.isfinite(x).all(-1)  # (windows, tokens)
        wanted = counted.numel() if mask is None else mask.sum()
        counted = counted if mask is None else counted & mask
        self.tokens += counted.sum()
        self.dropped += wanted - counted.sum()
        x = torch.where(counted[..., None], x, 0)  # tokens of zeros add nothing
        mean = x.abs().sum(1, dtype=torch.float64) / counted.sum(1).clamp_min(1)[:, None]
        self.largest = torch.maximum(self.largest, mean.amax(0))
        rows = x.flatten(0, 1)
        if not rows.is_cuda:  # how many are left is known without waiting
            rows = rows[counted.flatten()]
        self.squares += rows.float().square().sum(0, dtype=torch.float64)
        if self.products is not None:
            with full_float32():
                add_product_(self.products, rows.mT, rows)

    def result(self) -> InputStatistics:
        """The means, on the device of the sums.

        Raises:
            ValueError: no token was counted, or a sum is not finite.
        """
        tokens, dropped = int(self.tokens), int(self.dropped)
        if not tokens:
            raise ValueError(
                f"no finite input among {dropped} tokens. Run the model in float32, as a CPU does."
            )
        gram = None
        if self.products is not None:  # a float32 product is symmetric only up to rounding
            gram = (self.products / tokens).tril_()
            gram += gram.tril(-1).mT
        sums = [self.squares] if gram is None else [self.squares, gram]
        if not all(torch.isfinite(x).all() for x in sums):
            largest = self.largest.amax().item()
            raise ValueError(
                f"squares of inputs around {largest:.3g} overflow float32. Leave the layer out "
                "with skip, or choose a method that needs no data."
            )
        return InputStatistics(
            mean_square=self.squares / tokens,
            largest_mean=self.largest,
            gram=gram,
            tokens=tokens,
            dropped=dropped,
        )


class PairAccumulator:
    """Sums over pairs of inputs: x of the original model, x_hat of the quantized one.

    Args:
        in_features: width of the inputs.
        device: where the sums are kept.
    """

    def __init__(self, in_features: int, device: torch.device) -> None:
        self.own = Accumulator(in_features, "gram", device)
        self.drift = torch.zeros(in_features, in_features, device=device)

    def add(self, x: Tensor, x_hat: Tensor, mask: Tensor | None = None) -> None:
        """Count the tokens of some windows, as `Accumulator.add` does.

        A token with a value that is not finite in either is left out whole and counted.

        Args:
            x, x_hat: (windows, tokens, in_features), or (tokens, in_features) of one; any float
                dtype.
            mask: bool (windows, tokens), false where a token is padding; None = all count.
        """
        x, x_hat = (y.reshape(-1, *y.shape[-2:]).float() for y in (x, x_hat))
        finite = torch.isfinite(x).all(-1) & torch.isfinite(x_hat).all(-1)  # (windows, tokens)
        counted = finite if mask is None else finite & mask
        self.own.add(torch.where(finite[..., None], x_hat, torch.nan), mask)
        moved, read = (
            torch.where(counted[..., None], y, 0).flatten(0, 1) for y in (x - x_hat, x_hat)
        )
        with full_float32():
            self.drift.addmm_(moved.mT, read)

    def result(self) -> InputStatistics:
        """The means of x_hat and the drift, on the device of the sums.

        Raises:
            ValueError: no token was counted, or a sum is not finite.
        """
        found = self.own.result()
        return replace(found, drift=self.drift / found.tokens)
