"""`best`, ours: `fast` in sequence, each layer for what the quantized ones before it feed it.

Statistics are taken of the model quantized so far, and the target is the weight that makes up for
the drift of its inputs (methods/target.py). docs/methods.md has the ablation that chose the parts.
"""

from loftq.methods.fast import FAST

BEST = FAST.with_options(
    name="best",
    summary="Ours, needs text: as fast, but layer after layer, each making up for those before.",
    target="sequential",
    blend=1.0,
    target_damping=0.1,
)
