"""QLoRA (Dettmers et al., arXiv:2305.14314): round once, start the adapter at B = 0.

LoftQ's T = 0: the baseline that every start is compared with.
"""

from loftq.methods.base import Method

QLORA = Method(
    name="qlora",
    paper="2305.14314",
    summary="QLoRA: plain rounding, adapters start at zero (LoftQ's T = 0).",
    iterations=0,
)
