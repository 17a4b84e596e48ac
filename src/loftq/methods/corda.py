"""CorDA (Yang et al., arXiv:2406.05223), quantized: the adapter takes W's part that the task uses.

With C = E[x x^T] of task text, not its root, W C = U S V^T; the adapter starts as the r leading
terms of W = U S (V^T C^-1) and the rest is frozen: here it is rounded. That is QPiSSA in another
metric. The paper's knowledge mode, which trains the r *last* terms, starts from no correction of
rounding and is not here. C is damped by the paper's 0.01; errors in the record are ||E C||.
"""

from loftq.methods.base import Method

CORDA = Method(
    name="corda",
    paper="2406.05223",
    summary="CorDA, quantized: the adapter starts as the part of W that task text uses most.",
    needs="gram",
    metric="covariance",
    order="correct-first",
    metric_damping=0.01,
    iterations=1,
    reproduction=True,
)
