"""`max`, ours: `fast`, then gradients through the whole model.

The closed forms of `fast` know each layer by itself. All adapters together are then trained to give
the original model's distribution of the next token, min KL(p || p_hat) (refine/rows.py).
"""

from loftq.methods.fast import FAST

MAX = FAST.with_options(
    name="max",
    summary="Ours, needs text: as fast, then adapters trained against the original model.",
    refinement="distill",
)
