"""EoRA (Liu et al., arXiv:2410.21271): a rounded weight repaired in the eigenspace of its inputs.

With H = E[x x^T] = V diag(lambda) V^T of *task* text, the error is projected, E' = (W - Q) V
diag(sqrt(lambda)), truncated to rank r and projected back: B A = svd_r(E') diag(sqrt(lambda))^-1
V^T. That is the optimum of QERA-exact and CLoQ through another root of H. The paper repairs what
any compression left; here it is GPTQ, as in its own quantized rows.
"""

from loftq.methods.base import Method

EORA = Method(
    name="eora",
    paper="2410.21271",
    summary="EoRA: GPTQ, then its error repaired in the eigenspace of the task's inputs.",
    needs="gram",
    metric="eigenspace",
    rounding="gptq",
    iterations=1,
    reproduction=True,
)
