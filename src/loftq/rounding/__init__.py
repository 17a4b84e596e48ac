"""Weight to codes."""

from loftq.rounding.damping import MOST_DAMPING, DampingError, damped, damped_cholesky
from loftq.rounding.descent import DescentGptq, descend, output_error
from loftq.rounding.gptq import Gptq, Scales
from loftq.rounding.refit import refit_scales
from loftq.rounding.rtn import Rounded, round_to_nearest

__all__ = [
    "MOST_DAMPING",
    "DampingError",
    "DescentGptq",
    "Gptq",
    "Rounded",
    "Scales",
    "damped",
    "damped_cholesky",
    "descend",
    "output_error",
    "refit_scales",
    "round_to_nearest",
]
