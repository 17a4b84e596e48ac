"""Scores with their intervals."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np

RESAMPLES = 1000
Z = 1.959963984540054
"""Standard normal quantile of 0.975: all intervals hold 95 %."""


@dataclass(frozen=True, kw_only=True)
class Score:
    """A metric of a set of rows."""

    value: float
    """Shares, F1, correlations and ROUGE as fractions of 1; losses in nats a token."""
    low: float
    """Of a 95 % interval for other rows of the same kind; the spread over seeds is another one."""
    high: float
    rows: int
    """That it is taken over."""
    interval: str
    """wilson; bootstrap over rows (percentiles, 1000 resamples, seed 0); none = not asked for."""

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready."""
        return asdict(self)


def share(correct: Sequence[bool]) -> Score:
    """Share of rows that are right, with Wilson's interval (1927), sound near 0 and 1 too.

    Centre (p + z²/2n) / (1 + z²/n), half width z sqrt(p(1-p)/n + z²/4n²) / (1 + z²/n).
    """
    n = len(correct)
    p, scale = sum(correct) / n, 1 + Z**2 / n
    centre = (p + Z**2 / (2 * n)) / scale
    half = Z * math.sqrt(p * (1 - p) / n + Z**2 / (4 * n**2)) / scale
    low, high = max(0.0, centre - half), min(1.0, centre + half)
    return Score(value=p, low=min(low, p), high=max(high, p), rows=n, interval="wilson")


def mean(values: Sequence[float], weights: Sequence[float] | None = None) -> Score:
    """Mean of a figure of each row, weighted if so wanted (a loss by the tokens of its row)."""
    import numpy as np

    figures = np.asarray(values, dtype=np.float64)
    weight = np.ones_like(figures) if weights is None else np.asarray(weights, dtype=np.float64)

    def of(chosen: np.ndarray) -> float:
        return float((figures[chosen] * weight[chosen]).sum() / weight[chosen].sum())

    return bootstrapped(of, len(figures))


def bootstrapped(metric: Callable[[np.ndarray], float], rows: int) -> Score:
    """A metric with the percentiles 2.5 and 97.5 of its values on resampled rows.

    Args:
        metric: value on the rows of an index array, repeats among them.
        rows: how many there are.
    """
    import numpy as np

    random = np.random.default_rng(0)
    draws = [metric(random.integers(0, rows, rows)) for _ in range(RESAMPLES)]
    low, high = np.nanpercentile(draws, [2.5, 97.5])
    value = metric(np.arange(rows))
    return Score(value=value, low=float(low), high=float(high), rows=rows, interval="bootstrap")


def exactly(value: float, rows: int) -> Score:
    """A score whose interval nobody asked for."""
    return Score(value=value, low=value, high=value, rows=rows, interval="none")
