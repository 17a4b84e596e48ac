"""QPiSSA (Meng et al., arXiv:2404.02948): the adapter takes W's leading part, Q the rest.

B_1 A_1 = svd_r(W), Q_t = q(W - B_t A_t), B_{t+1} A_{t+1} = svd_r(W - Q_t): the alternation of
LoftQ begun, and ended, on the other half-step (the "SVD-first" order of LoftQ's Table 6).
"""

from loftq.methods.base import Method

QPISSA = Method(
    name="qpissa",
    paper="2404.02948",
    summary="QPiSSA: correct first, so that the adapter starts from W's leading directions.",
    order="correct-first",
    reproduction=True,
)
