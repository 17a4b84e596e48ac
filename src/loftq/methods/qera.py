"""QERA (Zhang et al., arXiv:2410.06040): round to nearest, then the best correction of the outputs.

Q = q(W) and B A = svd_r((W - Q) R) R^-1, which minimises E ||x (W - Q - B A)||^2: exactly with
R R^T = E[x x^T] (Theorem 1), and with R = diag(sqrt(E[x_i^2])) if inputs were uncorrelated (Theorem
2). Papers write y = x W; here W is (out, in). The released code leaves sigma on one factor; we
split evenly, as for every method.
"""

from loftq.methods.base import Method

QERA_APPROX = Method(
    name="qera-approx",
    paper="2410.06040",
    summary="QERA-approx: plain rounding, correction weighted by each input's mean square.",
    needs="diagonal",
    metric="diagonal",
    iterations=1,
    reproduction=True,
)

QERA_EXACT = Method(
    name="qera-exact",
    paper="2410.06040",
    summary="QERA-exact: plain rounding, the correction that is best for the outputs.",
    needs="gram",
    metric="gram",
    iterations=1,
    reproduction=True,
)
