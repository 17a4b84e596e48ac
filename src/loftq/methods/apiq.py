"""ApiQ (Liao et al., arXiv:2402.05147): adapters trained to give back each output, in sequence.

min over A, B of ||F(x_hat; Q + s B A) - F(x; W)||^2 with F one layer (`apiq-lw`) or one block
(`apiq-bw`), x_hat what it reads behind all that was trained before it. Q is rounded once, with
scales fitted by error; the paper trains a clipping factor of each group along with the adapters.
The diagonal is for the records alone.
"""

from loftq.methods.base import Method

APIQ_LW = Method(
    name="apiq-lw",
    paper="2402.05147",
    summary="Round once, then train the adapters layer by layer on the original outputs.",
    needs="diagonal",
    iterations=0,
    scale_fit="mse",
    refinement="layer",
    reproduction=True,
)

APIQ_BW = APIQ_LW.with_options(
    name="apiq-bw",
    summary="Round once, then train the adapters block by block on the original outputs.",
    refinement="block",
)
