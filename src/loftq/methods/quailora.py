"""QuAILoRA (Lawton et al., arXiv:2410.14713): plain rounding, factors by alternating least squares.

From the SVD of E = W - Q, 20 rounds of B = E H A^T (A H A^T)^-1 and A = (B^T B)^-1 B^T E with
H = E[x x^T] (lowrank/least_squares.py). The rounds converge to QERA-exact.
"""

from loftq.methods.base import Method

QUAILORA = Method(
    name="quailora",
    paper="2410.14713",
    summary="QuAILoRA: plain rounding, correction by 20 rounds of least squares on the outputs.",
    needs="gram",
    metric="gram",
    correction="least-squares",
    iterations=1,
    reproduction=True,
)
