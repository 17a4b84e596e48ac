"""CLoQ (Deng et al., arXiv:2501.18475): GPTQ, then the best correction of the outputs, one Gram.

Q = gptq(W) under H = E[x x^T] and B A = svd_r((W - Q) R) R^-1 with R R^T = H. The paper smooths W
by MagR (arXiv:2406.00800) before rounding; that step is not here, and the row says so. Damping is
the paper's 0.01 for both steps.
"""

from loftq.methods.base import Method

CLOQ = Method(
    name="cloq",
    paper="2501.18475",
    summary="CLoQ (without MagR): GPTQ, then the correction that is best for the outputs.",
    needs="gram",
    metric="gram",
    rounding="gptq",
    metric_damping=0.01,
    iterations=1,
    reproduction=True,
)
