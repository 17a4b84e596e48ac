"""Best correction by alternating least squares: B and A are refitted to each other in turn.

With H the Gram of the inputs and E = W - Q, both half-steps of min ||(E - B A) R||_F, R R^T = H,
are closed forms (QuAILoRA, arXiv:2410.14713):

    B = E H A^T (A H A^T)^-1,     A = (B^T B)^-1 B^T E

None can raise the error, and what they converge to is svd_r(E R) R^-1, the correction of QERA-exact
(arXiv:2410.06040). A solver, then, and no other optimum: one round is one step of subspace
iteration on E H E^T, so that it is slow where the spectrum is flat.

B A after a round depends on the spans alone: with V an orthonormal basis of the rows of A R, the
columns of B span those of E R V, and with U a basis of these, B A = U U^T E. Only such bases are
kept, so that nothing has to be inverted.
"""

from __future__ import annotations

import torch
from torch import Tensor

from loftq.lowrank.metrics import Metric
from loftq.lowrank.solve import LowRank, Solver
from loftq.lowrank.whitened import evenly_split

ROUNDS = 20


class LeastSquaresSolver:
    """Alternating least squares under a metric of the inputs.

    Args:
        start: plain solver whose correction of the residual is where it begins (the paper: SVD).
        metric: of the inputs; the output side does not change A, and is left out.
        rounds: of both half-steps, at least 1.
    """

    def __init__(self, start: Solver, metric: Metric, *, rounds: int = ROUNDS) -> None:
        self.start, self.metric, self.rounds = start, metric, rounds

    def solve(self, E: Tensor) -> LowRank:
        """Rank-r correction of each residual E (n, out_features, in_features)."""
        whitened, A = self.metric.input.apply(E), self.start.solve(E).A.double()
        for _ in range(self.rounds):
            V = torch.linalg.qr(self.metric.input.apply(A).mT).Q
            B = torch.linalg.qr(whitened @ V).Q
            A = B.mT @ E.double()
        return evenly_split(B, A)
