"""GPTQ (Frantar et al., arXiv:2210.17323): round column by column, pass each error on to the rest.

With inputs of Gram H, the output error of Q is tr((W - Q) H (W - Q)^T). Let H^-1 = U^T U with U
upper triangular. Columns are rounded in order; what rounding column j leaves is spread over the
columns not rounded yet so that they make up for it:

    e_j = (w_j - q(w_j)) / U_jj,     w_k <- w_k - e_j U_jk for k > j,

and the output error of the whole is sum_j ||e_j||^2. U needs no inverse of H: with J the reversal
of the order and J H J = C C^T, U = J C^-1 J.

Any grid takes part through fit, encode and decode. A group's scale is fitted when its turn comes,
to the columns as they are then, and codes are chosen under the scale as it is stored. The stored
form of a "dq" scale depends on all others: there a first sweep fits the scales, and a second one
rounds under the decoded ones.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from loftq.formats import FormatSpec, Grid, grid_of, round_trip_scales
from loftq.ops import round_columns
from loftq.ops.reference import spread
from loftq.rounding.damping import damped_cholesky
from loftq.rounding.rtn import Rounded

BLOCK = 128  # columns between two updates of everything to their right, under given scales


@dataclass(frozen=True)
class Scales:
    """Scales and zeros of a stack, (n, out_features, groups), and the scales as stored."""

    fitted: Tensor
    zeros: Tensor | None
    stored: Tensor

    @classmethod
    def of(cls, spec: FormatSpec, fitted: Tensor, zeros: Tensor | None) -> Scales:
        """With the scales sent through their coding."""
        return cls(fitted, zeros, round_trip_scales(fitted, spec.scale_coding))


class Gptq:
    """GPTQ under the Gram of one stack of weights; the factorization is made once.

    Args:
        gram: H = E[x x^T], (n, in_features, in_features).
        spec: the format.
        fit: rule that chooses a group's scale (formats/grids.py).
        damping: relative to the mean of diag H; `damping` then holds what was used, (n,).
        act_order: round the columns with the largest H_jj first. Scales are then fitted to W
            before any column moves, since the columns of a group no longer come together.
        strict: raise a DampingError where more damping is needed.
    """

    def __init__(
        self,
        gram: Tensor,
        spec: FormatSpec,
        *,
        fit: str,
        damping: float,
        act_order: bool = False,
        strict: bool = False,
    ) -> None:
        self.spec, self.fit, self.grid = spec, fit, grid_of(spec)
        self.order: Tensor | None = None
        if act_order:
            diagonal = gram.diagonal(dim1=-2, dim2=-1)
            self.order = diagonal.argsort(dim=-1, descending=True, stable=True)
            gram = columns_in(columns_in(gram, self.order).mT, self.order)
        lower, self.damping = damped_cholesky(gram.flip(-1, -2), damping, strict=strict)
        self.upper = torch.empty(gram.shape, device=gram.device)
        eye = torch.eye(gram.shape[-1], dtype=lower.dtype, device=lower.device)
        for upper, factor in zip(self.upper, lower, strict=True):  # float64 of one at a time
            inverse = torch.linalg.solve_triangular(factor, eye, upper=False)
            upper.copy_(inverse.flip(-1, -2))

    def __call__(self, W: Tensor) -> tuple[Rounded, Tensor]:
        """Round a stack (n, out_features, in_features) float32; returns it with its values."""
        rounded, values = self.draft(W)
        if self._fits_on_the_way and self.spec.scale_coding == "dq":
            return self.under(Scales.of(self.spec, rounded.scales, rounded.zeros), W)
        return rounded, values

    def draft(self, W: Tensor) -> tuple[Rounded, Tensor]:
        """The first sweep alone: its values do not know yet what "dq" does to the scales."""
        if not self._fits_on_the_way:
            return self.under(Scales.of(self.spec, *self.grid.fit(W, self.fit)), W)
        turn = _Fitted(self.spec, self.grid, self.fit)
        codes, values = self._sweep(W, turn)
        return Rounded(self.spec, codes, *turn.result()), values

    @property
    def _fits_on_the_way(self) -> bool:
        """Whether the columns of a group come together, and are fewer than a row."""
        return self.order is None and self.spec.group_size > 0

    def under(self, scales: Scales, W: Tensor) -> tuple[Rounded, Tensor]:
        """Round W under given scales."""
        turn = _Given(self.spec, scales, W.shape[-1], self.order)
        codes, values = self._sweep(W, turn)
        return Rounded(self.spec, codes, scales.fitted, scales.zeros), values

    def _sweep(self, W: Tensor, turn: _Turn) -> tuple[Tensor, Tensor]:
        """(codes, values) of W: within a block column by column, then one product for the rest."""
        rest = W.clone() if self.order is None else columns_in(W, self.order)
        codes, values = torch.empty_like(rest, dtype=torch.uint8), torch.empty_like(rest)
        levels, top = self.grid.codebook(W.device), self.grid.top
        for start in range(0, W.shape[-1], turn.width):
            at = slice(start, start + turn.width)
            scales, zeros = turn.scales_of(at, rest[..., at])
            codes[..., at], values[..., at], errors = round_columns(
                rest[..., at], self.upper[:, at, at], scales, zeros, levels, top
            )
            rest[..., at.stop :].baddbmm_(errors, self.upper[:, at, at.stop :], alpha=-1)
        if self.order is not None:
            back = self.order.argsort(-1)
            return columns_in(codes, back), columns_in(values, back)
        return codes, values


class _Turn(Protocol):
    """Scales of the columns as their turn comes."""

    width: int
    """Columns that are rounded between two updates of everything to their right."""

    def scales_of(self, at: slice, block: Tensor) -> tuple[Tensor, Tensor | None]:
        """Stored scales and zeros, broadcastable to the block, of the columns `at`."""


class _Given:
    """Scales known beforehand, spread over the columns in the order of rounding."""

    width = BLOCK

    def __init__(
        self, spec: FormatSpec, scales: Scales, in_features: int, order: Tensor | None
    ) -> None:
        def arranged(x: Tensor) -> Tensor:
            wide = spread(x, in_features, spec.group_size)
            wide = wide.expand(*wide.shape[:-1], in_features)
            return wide if order is None else columns_in(wide, order)

        self.scales = arranged(scales.stored)
        self.zeros = None if scales.zeros is None else arranged(scales.zeros)

    def scales_of(self, at: slice, block: Tensor) -> tuple[Tensor, Tensor | None]:
        return self.scales[..., at], None if self.zeros is None else self.zeros[..., at]


class _Fitted:
    """Scales fitted to each group when its first column is to be rounded."""

    def __init__(self, spec: FormatSpec, grid: Grid, fit: str) -> None:
        self.spec, self.grid, self.fit, self.width = spec, grid, fit, spec.group_size
        self.scales: list[Tensor] = []
        self.zeros: list[Tensor] = []

    def scales_of(self, at: slice, block: Tensor) -> tuple[Tensor, Tensor | None]:
        scale, zero = self.grid.fit(block, self.fit)
        self.scales.append(scale)
        if zero is not None:
            self.zeros.append(zero)
        coding = self.spec.scale_coding
        return scale if coding == "dq" else round_trip_scales(scale, coding), zero

    def result(self) -> tuple[Tensor, Tensor | None]:
        """Scales and zeros (n, out, groups) of all groups."""
        return torch.cat(self.scales, -1), torch.cat(self.zeros, -1) if self.zeros else None


def columns_in(X: Tensor, order: Tensor) -> Tensor:
    """The columns of each matrix of X (n, rows, columns) in its own order (n, columns)."""
    return X.gather(-1, order[:, None, :].expand(-1, X.shape[1], -1))
