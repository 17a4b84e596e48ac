"""What a correction aims at: the weight itself, or the one that makes up for what came before.

With the layers before it quantized, a layer reads x_hat where it used to read x. The output that
it should still give is W x, so that Q + B A is to minimise

    E ||W x - (Q + B A) x_hat||^2 = ||(W* - Q - B A) R||_F^2 + what no weight can mend,

    W* = W E[x x_hat^T] H^-1 = W + W D H^-1,    H = E[x_hat x_hat^T] = R R^T,
                                                D = E[(x - x_hat) x_hat^T].

Few tokens overfit W*, so that only a part of the way is taken, and H is damped (QEP,
arXiv:2504.09629, with a = 1/2; GPTAQ, arXiv:2504.02692, has a = 1):

    W*(a) = W + a W D (H + d mean(diag H) I)^-1.

Everything that rounds and corrects takes W*(a) in place of W and knows nothing of this.
"""

from __future__ import annotations

import torch
from torch import Tensor

from loftq.methods.problem import LayerProblem, known_gram, known_inputs
from loftq.rounding import damped_cholesky

TARGETS = ("symmetric", "sequential")
"""What statistics are taken of: the original model, or the one quantized so far."""
ROUNDED = ("target", "weight")
"""What Q is made from: W*, or W, which leaves W* - W to B A alone."""


def sequential_target(problem: LayerProblem, *, blend: float, damping: float) -> Tensor:
    """W*(blend), (n, out_features, in_features) float32; W where nothing has drifted.

    Args:
        problem: with the Gram H of what its layers read, and the drift D.
        blend: a, from 0 (W itself) to 1.
        damping: d, relative to the mean of diag H; raised where H needs it.

    Raises:
        ValueError: no statistics, or none of the drift, so of the original model.
        DampingError: strict, and the Gram needs more damping.
    """
    gram, drift, W = known_gram(problem), known_inputs(problem).drift, problem.weights
    if drift is None:
        raise ValueError(
            f"{problem.names[0]}: this method takes statistics in sequence, layer after layer of "
            "the quantized model. Give it calibration text and let the pipeline take them."
        )
    if not blend:
        return W
    lower, _ = damped_cholesky(gram, damping, strict=problem.strict)
    moved = W.double() @ drift.double()
    return (W + blend * torch.cholesky_solve(moved.mT, lower).mT).float()
