"""Fixed codebooks: the values a code stands for, before the scale of its group.

NormalFloat places its levels at quantiles of a normal distribution (QLoRA, arXiv:2305.14314); the
asymmetric form with an exact zero is the one LoftQ uses (arXiv:2310.08659), and its 4-bit table is
that of bitsandbytes to the last bit.
"""

from __future__ import annotations

from functools import lru_cache
from itertools import pairwise
from statistics import NormalDist

NF_OFFSET = 0.9677083  # probability of the outermost level, as in both papers' code

# The published tables, which readers must match to the bit: quantiles computed in float32. NF2 is
# a subset of NF4. `normal_float_recipe` gives them to 1e-6.
NF = {
    2: (-1.0, 0.0, 0.33791524171829224, 1.0),
    3: (
        -1.0, -0.47862920165061951, -0.21714179217815399, 0.0,
        0.16093020141124725, 0.33791524171829224, 0.56261700391769409, 1.0,
    ),
    4: (
        -1.0, -0.69619280099868774, -0.52507305145263672, -0.39491748809814453,
        -0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0,
        0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
        0.44070982933044434, 0.56261700391769409, 0.72295683622360229, 1.0,
    ),
}  # fmt: skip

# The non-linear 4-bit table of llama.cpp's IQ4_NL type; scales are in units of these integers.
IQ4_NL = (-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113)


def _even(start: float, stop: float, count: int) -> list[float]:
    return [start + (stop - start) * i / (count - 1) for i in range(count)]


def normal_float(bits: int) -> tuple[float, ...]:
    """The 2^bits levels of NormalFloat, ascending in [-1, 1], with an exact zero."""
    return NF[bits]


def normal_float_recipe(bits: int) -> tuple[float, ...]:
    """How the tables come about: 2^(bits-1) positive levels, one fewer negative, and zero.

    Levels are normal quantiles at an even grid of probabilities from NF_OFFSET down to 0.5, divided
    by the largest.
    """
    quantile, half = NormalDist().inv_cdf, 2 ** (bits - 1)
    positive = [quantile(p) for p in _even(NF_OFFSET, 0.5, half + 1)[:-1]]
    negative = [-quantile(p) for p in _even(NF_OFFSET, 0.5, half)[:-1]]
    levels = sorted([*negative, 0.0, *positive])
    return tuple(level / levels[-1] for level in levels)


@lru_cache
def symmetric_normal_float(bits: int) -> tuple[float, ...]:
    """Levels symmetric about zero, without a zero: midpoints of 2^bits + 1 normal quantiles."""
    quantile = NormalDist().inv_cdf
    edges = [quantile(p) for p in _even(1 - NF_OFFSET, NF_OFFSET, 2**bits + 1)]
    levels = [(a + b) / 2 for a, b in pairwise(edges)]
    return tuple(level / levels[-1] for level in levels)


def even_levels(bits: int) -> tuple[float, ...]:
    """2^bits equally spaced levels on [-1, 1]: the block-wise "uniform" code of the first LoftQ."""
    return tuple(_even(-1.0, 1.0, 2**bits))
