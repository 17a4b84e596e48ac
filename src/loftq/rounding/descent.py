"""Coordinate descent on codes and scales: what GPTQ leaves, taken up again from the start.

GPTQ decides each column once, before those to its right are known. Here every column is looked at
again with all others as they stand. With E = W - Q and G = E H, the best value for column j is

    q_j + G_j / H_jj,

rounded under its group's scale; no step can raise the output error tr(E H E^T). Between two
sweeps the scales are refitted to the codes (refit.py), which cannot raise it either, but for the
coding of the scales: the best round of each weight is kept.
"""

from __future__ import annotations

import torch
from torch import Tensor

from loftq.formats import grid_of, round_trip_scales
from loftq.ops import descend_columns
from loftq.ops.reference import spread
from loftq.rounding.damping import damped
from loftq.rounding.gptq import BLOCK, Gptq
from loftq.rounding.refit import refit_scales
from loftq.rounding.rtn import Rounded


class DescentGptq:
    """GPTQ, then `rounds` times: refit the scales, look at every column again.

    Args:
        gptq: the rounding to begin with.
        gram: H of the same weights, (n, in_features, in_features).
        rounds: two give most of the gain.
    """

    def __init__(self, gptq: Gptq, gram: Tensor, *, rounds: int = 2) -> None:
        self.gptq, self.rounds = gptq, rounds
        self.gram = damped(gram, gptq.damping).float()

    @property
    def damping(self) -> Tensor:
        """What the factorization needed, (n,)."""
        return self.gptq.damping

    def __call__(self, W: Tensor) -> tuple[Rounded, Tensor]:
        """Round a stack (n, out_features, in_features) float32; returns it with its values."""
        now, _ = self.gptq.draft(W)
        values = now.decode()
        pulled, least = self._judge(W - values)
        best, kept = now, values
        for _ in range(self.rounds):
            scales = refit_scales(W, self.gram, now, pulled=pulled)
            now = Rounded(now.spec, now.codes, scales, now.zeros)
            now, values = descend(W, self.gram, now)
            pulled, error = self._judge(W - values)
            better = error < least
            best = best.where(better, now)
            kept = torch.where(better[:, None, None], values, kept)
            least = torch.minimum(least, error)
        return best, kept

    def _judge(self, E: Tensor) -> tuple[Tensor, Tensor]:
        """E H float32, and tr(E H E^T) of each residual, (n,), summed in float64."""
        pulled = E @ self.gram
        return pulled, (pulled * E).sum((1, 2), dtype=torch.float64)


def descend(W: Tensor, gram: Tensor, rounded: Rounded) -> tuple[Rounded, Tensor]:
    """One sweep over all columns; scales and zeros stay.

    Args:
        W: (n, out_features, in_features) float32.
        gram: H, damped, (n, in_features, in_features).
        rounded: where to begin.

    Returns:
        (Rounded, its values); the output error is at most what it was.
    """
    spec, grid, columns = rounded.spec, grid_of(rounded.spec), W.shape[-1]
    H = gram.float()
    stored = round_trip_scales(rounded.scales, spec.scale_coding)
    scales = spread(stored, columns, spec.group_size).expand(W.shape)
    zeros = rounded.zeros
    zeros = None if zeros is None else spread(zeros, columns, spec.group_size).expand(W.shape)
    codes, Q = rounded.codes.clone(), rounded.decode()
    G = (W - Q) @ H
    levels, top = grid.codebook(W.device), grid.top
    for start in range(0, columns, BLOCK):
        at, after = slice(start, start + BLOCK), slice(start + BLOCK, columns)
        zero = None if zeros is None else zeros[..., at]
        codes[..., at], values = descend_columns(
            Q[..., at], G[..., at], H[:, at, at], scales[..., at], zero, levels, top
        )
        G[..., after].baddbmm_(values - Q[..., at], H[:, at, after], alpha=-1)
        Q[..., at] = values
    return Rounded(spec, codes, rounded.scales, rounded.zeros), Q


def output_error(E: Tensor, gram: Tensor) -> Tensor:
    """tr(E H E^T) of each residual of a stack, (n,) float64."""
    E = E.double()
    return ((E @ gram.double()) * E).sum((1, 2))
