"""Cost = what the model's next-token distribution loses when one layer alone is packed.

    cost[i, f] = mean over tokens of KL(p || p_i,f) in nats,

p of the model as it is, p_i,f of the model with Q + s B A of layer i in format f. Measured, so that
it knows which layers the model's output depends on; the sum over layers takes their effects as
independent, which holds to first order for small ones.
"""

from __future__ import annotations

from torch import Tensor

from loftq.allocation.base import Allocation


def divergence(reference: Tensor, logits: Tensor) -> Tensor:
    """Sum over tokens of KL(softmax(reference) || softmax(logits)), in nats.

    Args:
        reference: (tokens, vocabulary) float32.
        logits: of the same shape.
    """
    log_p, log_q = reference.log_softmax(-1), logits.log_softmax(-1)
    return (log_p.exp() * (log_p - log_q)).sum()


KL = Allocation(
    name="kl",
    paper="",
    summary="least sum of measured KL of the next token, one layer packed at a time; needs --data.",
    of_outputs=divergence,
)
