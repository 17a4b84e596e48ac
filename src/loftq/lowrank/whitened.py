"""The best rank-r correction under a metric: B A = L^-1 svd_r(L E R) R^-1.

For invertible L and R this minimises ||L (E - B A) R||_F (Eckart-Young for L E R). With R the root
of the Gram of the inputs it is the adapter of QERA-exact (arXiv:2410.06040, Theorem 1), CLoQ
(arXiv:2501.18475) and EoRA (arXiv:2410.21271).
"""

from __future__ import annotations

import torch
from torch import Tensor

from loftq.lowrank.metrics import Metric
from loftq.lowrank.orthonormal import orthonormal
from loftq.lowrank.solve import LowRank, Solver


class WhitenedSolver:
    """Any solver, exact or filtered, turned into one for a metric.

    The inner solver only has to find V, the leading right singular vectors of L E R: for given V
    the best B A is (L^-1 (L E R) V) (V^T R^-1), which is formed in float64. An error in V enters
    the objective squared.
    """

    def __init__(self, inner: Solver, metric: Metric) -> None:
        self.inner, self.metric = inner, metric

    def solve(self, E: Tensor) -> LowRank:
        """Rank-r correction of each residual E (n, out_features, in_features) under the metric."""
        whitened = self.metric.apply(E).double()
        V, _ = orthonormal(self.inner.solve(whitened).A.mT.double())
        B = self.metric.output.unapply((whitened @ V).mT).mT
        return evenly_split(B, self.metric.input.unapply(V.mT))


def evenly_split(B: Tensor, A: Tensor) -> LowRank:
    """The factors of B A that carry sqrt(singular value of B A) each, as LoftQ's do.

    A metric decides the product; how it is split decides how training goes on. R^-1 blows up the
    rows of A that meet inputs of little variance, so all methods start from one and the same split.

    Args:
        B: (n, out_features, rank) float64.
        A: (n, rank, in_features) float64.
    """
    left, upper = orthonormal(B)
    right, other = orthonormal(A.mT)
    # The cores are rank x rank: LAPACK on the host is faster than a GPU there (chebyshev.py).
    U, S, Vt = (part.to(B.device) for part in torch.linalg.svd((upper @ other.mT).cpu()))
    root = S.sqrt()
    B = left @ (U * root[:, None, :])
    A = (root[:, :, None] * Vt) @ right.mT
    return LowRank(B.float().contiguous(), A.float().contiguous())
