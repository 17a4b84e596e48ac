"""CLoQ (Deng et al., arXiv:2501.18475): MagR, GPTQ, then the best correction of the outputs.

With H = E[x x^T]: Q = gptq(magr(W)) under H, and B A = svd_r((W - Q) R) R^-1 with R R^T = H.
Damping is the paper's 0.01 for both steps. `cloq-core` leaves MagR (arXiv:2406.00800) out.
"""

from loftq.methods.base import Method

CLOQ_CORE = Method(
    name="cloq-core",
    paper="2501.18475",
    summary="CLoQ without MagR: GPTQ, then the correction that is best for the outputs.",
    needs="gram",
    metric="gram",
    rounding="gptq",
    metric_damping=0.01,
    iterations=1,
    reproduction=True,
)

CLOQ = CLOQ_CORE.with_options(
    name="cloq",
    summary="CLoQ: smaller magnitudes (MagR), GPTQ, the correction that is best for the outputs.",
    transform="magr",
)
