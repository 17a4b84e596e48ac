"""LoftQ (Li et al., arXiv:2310.08659): alternate Q_t = q(W - B A) and B A = svd_r(W - Q_t).

`LOFTQ` is ours: any format and fit, the best iterate of each weight, a warm filtered solver.
`LOFTQ_PAPER` is what tables call "LoftQ as published": absmax, float32 scales, exact SVD, the last
of a fixed number of iterations. The paper writes Y = X W and A B^T; here W is (out, in) and the
product is B A.
"""

from loftq.methods.base import Method

LOFTQ = Method(
    name="loftq",
    paper="2310.08659",
    summary="LoftQ: backbone and adapters chosen together, data-free; best of 5 alternations.",
)

LOFTQ_PAPER = Method(
    name="loftq-paper",
    paper="2310.08659",
    summary="LoftQ as published: absmax and float32 scales, exact SVD, last of 5 alternations.",
    keep="last",
    solver="exact",
    scale_fit="absmax",
    scale_coding="f32",
    reproduction=True,
)
