"""ProjQ (Yu et al., arXiv:2606.00494): round against what no adapter can repair.

P-step: the r_d leading right singular vectors P of E X, E = W - Q the current residual. W-step:
Q = gptq(W) for the inputs X (I - P P^T). In terms of the Gram, X (I - P P^T) X^T = H - H A^T A H
with A = svd_{r_d}'s right factor, A H A^T = I (schedules/projection.py). Three rounds from plain
GPTQ, then the best correction of rank r_a, the adapter's. r_d is `design_rank`, r_a unless given.
"""

from loftq.methods.base import Method

PROJQ = Method(
    name="projq",
    paper="2606.00494",
    summary="ProjQ: GPTQ against the part of the inputs that a correction cannot reach, 3 rounds.",
    needs="gram",
    metric="gram",
    rounding="gptq",
    schedule="residual-projection",
    iterations=3,
    reproduction=True,
)
