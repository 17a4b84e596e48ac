"""Weight to codes."""

from loftq.rounding.damping import DampingError, damped, damped_cholesky
from loftq.rounding.gptq import Gptq, Scales
from loftq.rounding.rtn import Rounded, round_to_nearest

__all__ = [
    "DampingError",
    "Gptq",
    "Rounded",
    "Scales",
    "damped",
    "damped_cholesky",
    "round_to_nearest",
]
