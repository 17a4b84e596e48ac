"""SRR (arXiv:2602.02001): part of the rank preserves W before rounding, the rest repairs after.

B_1 A_1 = svd_k(W R) R^-1, Q = q(W - B_1 A_1), B_2 A_2 = svd_{r-k}((W - B_1 A_1 - Q) R) R^-1 with
R R^T = E[x x^T], and k = argmin rho_k(W R) rho_{r-k}(U R) for noise U (schedules/preserve.py).
"""

from loftq.methods.base import Method

SRR = Method(
    name="srr",
    paper="2602.02001",
    summary="SRR: k ranks preserve W before plain rounding, r - k repair after; k per layer.",
    needs="gram",
    metric="gram",
    schedule="preserve",
    iterations=1,
    solver="exact",
    reproduction=True,
)
