"""Metrics: what an error E = W - Q - B A costs, ||L E R||_F, L and R weighing outputs and inputs.

R is any square root of the input statistics, R R^T = H:

    identity    R = I: LoftQ (arXiv:2310.08659)
    diagonal    R = diag(sqrt(E[x_i^2])): QERA-approx (arXiv:2410.06040)
    gram        R R^T = E[x x^T]: QERA-exact, CLoQ (arXiv:2501.18475); ||E R||_F^2 is the mean of
                ||E x||^2, the error of the layer's output on the calibration tokens
    covariance  R = E[x x^T] itself: CorDA (arXiv:2406.05223); inputs count by their variance twice

Two roots of one H differ by an orthogonal factor on the right, which neither the norm nor the best
B A notices (tests/lowrank/test_metrics.py). The Cholesky root is the cheapest; the eigenvector
root is there where directions are wanted. L works in the same way on E^T.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor

from loftq.rounding.damping import damped, damped_cholesky, raised_eigenvalues


class Root(Protocol):
    """A square root R of the statistics of one side, for a stack of n weights."""

    def apply(self, E: Tensor) -> Tensor:
        """E R for E (n, rows, features)."""

    def unapply(self, A: Tensor) -> Tensor:
        """A R^-1 for A (n, rows, features)."""


class IdentityRoot:
    """R = I: every feature counts alike."""

    def apply(self, E: Tensor) -> Tensor:
        """E itself."""
        return E

    def unapply(self, A: Tensor) -> Tensor:
        """A itself."""
        return A


class DiagonalRoot:
    """R = diag(sqrt(h + d mean h)): features counted by their mean square h, correlations ignored.

    Args:
        mean_square: h = E[x_i^2], (n, features), not negative.
        damping: d, keeps features that never occur invertible.
    """

    def __init__(self, mean_square: Tensor, *, damping: float) -> None:
        h = mean_square.double()
        mean = h.mean(-1, keepdim=True)
        self.root = (h + damping * torch.where(mean > 0, mean, torch.ones_like(mean))).sqrt()

    def apply(self, E: Tensor) -> Tensor:
        """E R, float64."""
        return E.double() * self.root[:, None, :]

    def unapply(self, A: Tensor) -> Tensor:
        """A R^-1, float64."""
        return A.double() / self.root[:, None, :]


class CholeskyRoot:
    """R = C, lower triangular, C C^T = H + d mean(diag H) I; `damping` holds the d used, (n,).

    Args:
        gram: H = E[x x^T], (n, features, features).
        damping: d to begin with; raised where the factorization needs it.
        strict: raise a DampingError instead.
    """

    def __init__(self, gram: Tensor, *, damping: float, strict: bool = False) -> None:
        self.factor, self.damping = damped_cholesky(gram, damping, strict=strict)

    def apply(self, E: Tensor) -> Tensor:
        """E C, float64."""
        return E.double() @ self.factor

    def unapply(self, A: Tensor) -> Tensor:
        """A C^-1, float64, by substitution."""
        return torch.linalg.solve_triangular(self.factor, A.double(), upper=False, left=False)


class EigenRoot:
    """R = V diag(sqrt(lambda)), H + d mean(diag H) I = V diag(lambda) V^T; `damping` holds d, (n,).

    Args:
        gram: H = E[x x^T], (n, features, features).
        damping: d to begin with; raised tenfold while an eigenvalue is not above rounding.
        strict: raise a DampingError instead.
    """

    def __init__(self, gram: Tensor, *, damping: float, strict: bool = False) -> None:
        values, self.vectors = torch.linalg.eigh(damped(gram, 0.0))
        values, self.damping = raised_eigenvalues(gram, values, damping, strict=strict)
        self.root = values.sqrt()

    def apply(self, E: Tensor) -> Tensor:
        """E V diag(sqrt(lambda)), float64."""
        return (E.double() @ self.vectors) * self.root[:, None, :]

    def unapply(self, A: Tensor) -> Tensor:
        """A diag(sqrt(lambda))^-1 V^T, float64."""
        return (A.double() / self.root[:, None, :]) @ self.vectors.mT


class CovarianceRoot:
    """R = H + d mean(diag H) I itself, not a root of it; `damping` holds the d used, (n,).

    Args:
        gram: H = E[x x^T], (n, features, features).
        damping: d to begin with; raised where the Cholesky factor that inverts R needs it.
        strict: raise a DampingError instead.
    """

    def __init__(self, gram: Tensor, *, damping: float, strict: bool = False) -> None:
        self.factor, self.damping = damped_cholesky(gram, damping, strict=strict)

    def apply(self, E: Tensor) -> Tensor:
        """E R, float64."""
        return (E.double() @ self.factor) @ self.factor.mT

    def unapply(self, A: Tensor) -> Tensor:
        """A R^-1, float64, by two substitutions."""
        return torch.cholesky_solve(A.double().mT, self.factor).mT


@dataclass(frozen=True)
class Metric:
    """Roots of the input and output side; both are the identity unless given."""

    input: Root = field(default_factory=IdentityRoot)
    output: Root = field(default_factory=IdentityRoot)

    def apply(self, E: Tensor) -> Tensor:
        """L E R for residuals E (n, out_features, in_features)."""
        E = self.input.apply(E)
        return E if isinstance(self.output, IdentityRoot) else self.output.apply(E.mT).mT

    def norm(self, E: Tensor) -> Tensor:
        """||L E R||_F of each residual, (n,) float64: float32 squares are summed row by row."""
        rows = torch.linalg.vector_norm(self.apply(E), dim=-1)
        return torch.linalg.vector_norm(rows, dim=-1, dtype=torch.float64)
