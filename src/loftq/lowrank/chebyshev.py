"""Chebyshev-filtered subspace iteration, warm-started: rank-r corrections of a drifting residual.

Inside an alternation the residual E changes little from one step to the next, so the block V that
spanned its leading right singular vectors last time is nearly right now. One Chebyshev polynomial
T_d of E^T E, scaled so that everything below the block's lowest Ritz value stays within [-1, 1],
amplifies exactly the directions the block should hold; Rayleigh-Ritz then picks the best r.
Quantization residuals have flat spectra, where a polynomial needs 1/sqrt(gap) products for what
power iteration needs 1/gap of (Musco & Musco, arXiv:1504.05477; Zhou et al. 2006 for the filter).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from loftq.lowrank.orthonormal import orthonormal
from loftq.lowrank.solve import LowRank, balanced

OVERSAMPLE = 64  # columns beyond the rank: they set the filter's lower edge
DEGREE = 3  # of the polynomial of one round, where the spectrum allows it
COLD_ROUNDS = 2
GROWTH = 1e10  # bound on what a round amplifies the largest direction by, in float32
FAST_GROWTH = 1e4  # the same with fast products: those of a steeper spectrum stay in float32


class ChebyshevSolver:
    """Keeps one orthonormal block per matrix between calls. Not for exact singular values."""

    def __init__(self, rank: int, *, generator: torch.Generator) -> None:
        self.rank, self.generator = rank, generator
        self.block: Tensor | None = None

    def solve(self, E: Tensor) -> LowRank:
        """Rank-r correction of each matrix of E (n, out_features, in_features), in float32."""
        E = E.float()
        if E.shape[-2] < E.shape[-1]:
            flipped = self._solve(E.mT)
            return LowRank(flipped.A.mT.contiguous(), flipped.B.mT.contiguous())
        return self._solve(E)

    def _solve(self, E: Tensor) -> LowRank:
        rounds, products = 1, GramProducts(E)
        if self.block is None or self.block.shape[:-1] != (len(E), E.shape[-1]):
            columns = min(self.rank + OVERSAMPLE, E.shape[-1])
            start = torch.randn(E.shape[-1], columns, generator=self.generator).to(E)
            start = orthonormalize(products.fast(start.expand(len(E), -1, -1)))
            self.block, _ = rayleigh_ritz(E, start)
            rounds = COLD_ROUNDS
        for _ in range(rounds):
            filtered = orthonormalize(chebyshev_filter(products, self.block))
            self.block, projected = rayleigh_ritz(E, filtered)
        top = slice(self.block.shape[-1] - self.rank, None)
        return balanced(projected[..., top], self.block[..., top])


def rayleigh_ritz(E: Tensor, V: Tensor) -> tuple[Tensor, Tensor]:
    """(V R, E V R): the block V turned into Ritz vectors of E^T E, by ascending value."""
    projected = E @ V
    _, rotation = small_eigh(projected.mT @ projected)
    return V @ rotation, projected @ rotation


class GramProducts:
    """V -> E^T E V for a stack of residuals E, exactly (float32) or fast.

    On a GPU `fast` rounds the operands to float16, scaled to at most 1, and sums in float32: the 11
    significant bits of TF32 at twice the speed and half the traffic, and without a setting that the
    whole process shares. Elsewhere it is the exact product.
    """

    def __init__(self, E: Tensor) -> None:
        self.E = E
        self._half = self._size = None
        if E.is_cuda and torch.version.hip is None:
            self._half, self._size = _halved(E, (-2, -1))

    def exact(self, V: Tensor) -> Tensor:
        """E^T (E V), (n, in_features, k) float32."""
        return self.E.mT @ (self.E @ V)

    def fast(self, V: Tensor) -> Tensor:
        """The same to about three digits."""
        if self._half is None or self._size is None:
            return self.exact(V)
        half, size = _halved(V, -2)
        half, grown = _halved(torch.bmm(self._half, half, out_dtype=torch.float32), -2)
        product = torch.bmm(self._half.mT, half, out_dtype=torch.float32)
        return product.mul_(size * grown * self._size.square())


def _halved(X: Tensor, dim: int | tuple[int, ...]) -> tuple[Tensor, Tensor]:
    """X over its largest magnitude along `dim` in float16, and that magnitude."""
    size = X.abs().amax(dim, keepdim=True).clamp_min(torch.finfo(torch.float32).tiny)
    return (X / size).half(), size


def chebyshev_filter(products: GramProducts, V: Tensor) -> Tensor:
    """T_d((2/b) E^T E - I) V, b the lowest Ritz value of V, per matrix.

    V's columns are Ritz vectors, of this E or of the one before it, so v^T E^T E v are their Ritz
    values, and each column grows by its own factor. T_d(x) = cosh(d acosh x) amplifies the largest
    direction, at x = 2 top / b - 1, the most. What rounding leaves of that direction in the other
    columns grows with it, and drowns them past GROWTH: steep spectra (absmax 2-bit residuals) get
    a lower degree. b itself must not be raised instead: T_d vanishes inside [-1, 1], and a wanted
    direction could lie there.
    """
    tiny = torch.finfo(torch.float32).tiny
    product = products.fast(V)
    ritz = (V * product).sum(-2)
    top = ritz.amax(-1)
    # Below float32's reach of the largest, a Ritz value is rounding, and may be negative.
    low = torch.maximum(ritz.amin(-1), 1e-7 * top).clamp_min(tiny)
    steepness = (top / low).amax().item()
    degree = next(d for d in range(DEGREE, 0, -1) if d == 1 or steepness <= _steepest(d, GROWTH))
    half = (low / 2)[..., None, None]
    before, now = V, product / half - V
    times = products.fast if steepness <= _steepest(degree, FAST_GROWTH) else products.exact
    for _ in range(degree - 1):
        after = 2 * (times(now) / half - now) - before
        # Any scale per column will do, as long as both terms of the recurrence share it.
        size = after.abs().amax(-2, keepdim=True).clamp_min(tiny)
        before, now = now / size, after / size
    return now


def _steepest(degree: int, growth: float) -> float:
    """top / b at which a filter of this degree amplifies by `growth`."""
    return (math.cosh(math.acosh(growth) / degree) + 1) / 2


def orthonormalize(Y: Tensor) -> Tensor:
    """Orthonormal columns with the span of Y, float32."""
    return orthonormal(Y)[0].float()


def small_eigh(G: Tensor) -> tuple[Tensor, Tensor]:
    """Ascending eigenvalues and eigenvectors of small symmetric matrices, on the host.

    LAPACK takes 1.4 ms for a 128 x 128 problem in float64 and 0.9 ms in float32, an H100 over 4 ms
    in either. Beside a GPU, where this is a third of the solve, float32 is used: it may mix Ritz
    vectors a little, which costs the next filter nothing.
    """
    host = ((G + G.mT) / 2).cpu()
    values, vectors = torch.linalg.eigh(host if G.is_cuda else host.double())
    return values.to(G), vectors.to(G)
