"""LQ-LoRA (Guo et al., arXiv:2311.12023): the SVD first, weighted by what the loss depends on.

    B_t A_t = D_row^-1 svd_r(D_row (W - Q_{t-1}) D_col) D_col^-1,   Q_0 = 0,   Q_t = q(W - B_t A_t)

with D_row = diag(sqrt(mean_j F_ij)), D_col = diag(sqrt(mean_i F_ij)) of the Fisher diagonal F. The
paper stops when the error rises; we keep the best of 10 steps, in the same norm
||D_row (W - Q - B A) D_col||_F. Its integer program over formats is `allocation=error`, which with
this method weighs squared errors by the same F.
"""

from loftq.methods.base import Method

LQ_LORA = Method(
    name="lq-lora",
    paper="2311.12023",
    summary="LQ-LoRA: correct first, rows and columns weighted by the Fisher information.",
    needs="fisher",
    metric="fisher",
    iterations=10,
    order="correct-first",
    reproduction=True,
)
