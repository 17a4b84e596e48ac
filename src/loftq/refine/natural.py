"""One natural-gradient step of a correction that stays of its rank (Align-then-Correct, stage 2).

Let a loss depend on a layer through L = s B A, with mean gradient G = dloss/dL, inputs of Gram
H = E[x x^T] and output gradients of Gram Hz = E[g g^T], whose Kronecker product stands for the
curvature. In the coordinates Y = Hz^1/2 L H^1/2, where that is the identity, the step is the
gradient's, cut back to the rank:

    L' = Hz^-1/2 svd_r(Y - a M) H^-1/2,    M = Hz^-1/2 G H^-1/2,    a = min(1, trust ||Y|| / ||M||).

If the loss is tr(Hz (E - L) H (E - L)^T) / 2, then M = -Hz^1/2 (E - L) H^1/2 and a = 1 ends at the
best correction of E under both metrics at once. `trust` bounds a step relative to what it changes:
the curvature is that of a few thousand tokens. A correction that is zero stays zero.
"""

from __future__ import annotations

import torch
from torch import Tensor

from loftq.lowrank import LowRank, best_correction, evenly_split

DAMPING = 1e-2  # of both Grams, relative to the largest eigenvalue


class NaturalStep:
    """Steps of one layer; its roots are made once.

    Args:
        G: gradient of the loss by the weight, (out_features, in_features).
        H: E[x x^T], (in_features, in_features).
        Hz: E[g g^T], (out_features, out_features), g the gradient of the loss by an output.
        damping: of H and Hz, relative to the largest eigenvalue.
    """

    def __init__(self, G: Tensor, H: Tensor, Hz: Tensor, *, damping: float = DAMPING) -> None:
        self.R, self.R_inverse = _root(H, damping)
        self.S, self.S_inverse = _root(Hz, damping)
        self.M = self.S_inverse @ G.double() @ self.R_inverse

    def after(self, factors: LowRank, *, trust: float) -> LowRank:
        """The correction L' that a step leads to from L.

        Args:
            factors: L = B A, B (1, out_features, rank), A (1, rank, in_features) float32, with s
                in them.
            trust: largest ||a M|| relative to ||Y||, 0 <= trust.

        Returns:
            LowRank of the same shapes, float32, evenly split; computed in float64.
        """
        Y = (self.S @ factors.B[0].double()) @ (factors.A[0].double() @ self.R)
        size = torch.linalg.matrix_norm(self.M).clamp_min(torch.finfo(torch.float64).tiny)
        a = (trust * torch.linalg.matrix_norm(Y) / size).clamp(max=1)
        cut = best_correction(Y - a * self.M, factors.A.shape[1])
        B, A = self.S_inverse @ cut.B.double(), cut.A.double() @ self.R_inverse
        return evenly_split(B[None], A[None])


def _root(H: Tensor, damping: float) -> tuple[Tensor, Tensor]:
    """Symmetric root of H + damping lambda_max I, and its inverse; float64. Of zero, that of I."""
    values, V = torch.linalg.eigh(H.double())
    values = values.clamp_min(0)
    most = torch.where(values[-1] > 0, values[-1], torch.ones_like(values[-1]))
    root = (values + damping * most).sqrt()
    return (V * root) @ V.mT, (V / root) @ V.mT
