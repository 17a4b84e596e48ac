"""Best rank-r correction of a residual E = W - Q: the truncated SVD (Eckart-Young)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor


@dataclass(frozen=True)
class LowRank:
    """A stack of products B @ A, split evenly: both factors carry sqrt(singular value)."""

    B: Tensor
    """(n, out_features, rank) float32."""
    A: Tensor
    """(n, rank, in_features) float32."""

    def product(self) -> Tensor:
        """B @ A, (n, out_features, in_features)."""
        return self.B @ self.A

    def update_(self, better: Tensor, other: LowRank) -> None:
        """Take over the products of `other` where `better` (n,) bool is set, in place."""
        self.B[better] = other.B[better]
        self.A[better] = other.A[better]


class Solver(Protocol):
    """Finds corrections of a sequence of similar residuals; may keep state between calls."""

    def solve(self, E: Tensor) -> LowRank:
        """Rank-r correction of each matrix of E (n, out_features, in_features) float32."""


class ExactSolver:
    """svd_r(E) by the eigenvectors of the smaller Gram matrix in float64: the reference.

    With E = U S V^T, the top eigenvectors of E^T E are V_r and E V_r = U_r S_r. float64 leaves the
    leading singular vectors of float32 residuals exact to about 1e-8, at a tenth of an SVD's cost.
    """

    def __init__(self, rank: int) -> None:
        self.rank = rank

    def solve(self, E: Tensor) -> LowRank:
        """One matrix at a time, so that only one float64 Gram matrix is alive."""
        factors = [best_correction(e, self.rank) for e in E]
        return LowRank(torch.stack([f.B for f in factors]), torch.stack([f.A for f in factors]))


def best_correction(E: Tensor, rank: int) -> LowRank:
    """Best rank-`rank` correction of one residual: argmin ||E - B A||_F = svd_rank(E).

    LoftQ (arXiv:2310.08659), Algorithm 1, line 4: A = [sqrt(s_i) u_i], B = [sqrt(s_i) v_i]; the
    paper's A is our B and its B^T our A.

    Args:
        E: W - Q, (out_features, in_features) float32 or float64.
        rank: 1 <= rank <= min(E.shape).

    Returns:
        LowRank(B (out_features, rank), A (rank, in_features)) float32 on E.device.

    Raises:
        ValueError: rank out of range.
    """
    if not 1 <= rank <= min(E.shape):
        raise ValueError(f"rank={rank} is outside 1..{min(E.shape)} for shape {tuple(E.shape)}.")
    if E.shape[0] < E.shape[1]:
        flipped = best_correction(E.mT, rank)
        return LowRank(flipped.A.mT.contiguous(), flipped.B.mT.contiguous())
    double = E.double()
    _, vectors = torch.linalg.eigh(double.mT @ double)
    return balanced(double @ vectors[:, -rank:], vectors[:, -rank:])


def balanced(US: Tensor, V: Tensor) -> LowRank:
    """Factors with equal norms from U S (.., out, rank) and orthonormal V (.., in, rank)."""
    root = torch.linalg.vector_norm(US, dim=-2, keepdim=True).sqrt()
    B = US / root.clamp_min(torch.finfo(torch.float32).tiny)
    return LowRank(B.float().contiguous(), (V * root).mT.float().contiguous())


def make_solver(name: str, rank: int, generator: torch.Generator) -> Solver:
    """A fresh solver: "exact" or "chebyshev"."""
    if name == "exact":
        return ExactSolver(rank)
    if name == "chebyshev":
        from loftq.lowrank.chebyshev import ChebyshevSolver

        return ChebyshevSolver(rank, generator=generator)
    raise ValueError(f"unknown solver {name!r}; choose one of {', '.join(SOLVERS)}.")


SOLVERS = ("chebyshev", "exact")
