"""RILQ (Lee et al., arXiv:2412.01129): all adapters trained at once on the model's loss.

0.5 ||h_hat - h||^2 / ||h||^2 + 0.5 cross-entropy of the text, h the last hidden state. Q may come
from anywhere; here it is rounded once, with scales fitted by error. The diagonal is for the records
alone.
"""

from loftq.methods.base import Method

RILQ = Method(
    name="rilq",
    paper="2412.01129",
    summary="Round once, then train all adapters on the last hidden state and the text.",
    needs="diagonal",
    iterations=0,
    scale_fit="mse",
    refinement="hidden-language",
    reproduction=True,
)
