"""`max`, ours: `fast`, then gradients, block by block and through the whole model.

The closed forms of `fast` know each layer by itself. Each block is then trained to give the
original block's output on what it reads behind the refined ones, and all adapters together to give
the original model's distribution of the next token (refine/rows.py).
"""

from loftq.methods.fast import FAST

MAX = FAST.with_options(
    name="max",
    summary="Ours, needs text: as fast, then adapters trained against the original model.",
    refinement="block-distill",
)
