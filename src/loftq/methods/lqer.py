"""LQER (Zhang et al., arXiv:2402.02446): correction weighted by how large each input gets.

Its L2QER form: Q = q(W) and B A = svd_r((W - Q) D) D^-1 with D_i = a_i / sqrt(min a max a) and a_i
the largest mean of |x_i| over the calibration windows: a heuristic scale, where QERA-approx
derives one. The paper writes y = x W; here W is (out, in).
"""

from loftq.methods.base import Method

LQER = Method(
    name="lqer",
    paper="2402.02446",
    summary="L2QER: plain rounding, correction weighted by the largest mean of each input.",
    needs="diagonal",
    metric="largest-mean",
    iterations=1,
    reproduction=True,
)
