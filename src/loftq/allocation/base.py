"""An allocation as a row: what a layer in a format costs, and how that is found out."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from loftq.methods import ProblemStatistics

ResidualCost = Callable[[Tensor, Tensor, ProblemStatistics | None], float]
"""(E, W, statistics of this one weight) -> cost; E = W - Q - scaling B A, (out, in) float32."""
OutputCost = Callable[[Tensor, Tensor], Tensor]
"""(reference, logits), each (tokens, vocabulary) float32 -> cost summed over tokens, a scalar."""


@dataclass(frozen=True, kw_only=True)
class Allocation:
    """A way to spend bytes on layers: min sum_i cost[i, f_i] with sum_i bytes[i, f_i] <= budget.

    A row that measures fills cost[i, f] for every layer i and candidate format f, everything else
    left at 16 bits, and the knapsack is solved exactly (allocation/knapsack.py). A row gives one of
    the two costs, or neither: then formats go by depth alone.
    """

    name: str
    paper: str
    """arXiv number of the source, or "" for our own."""
    summary: str
    """One line for tables and --help."""
    of_residual: ResidualCost | None = None
    """Cost of a layer by itself, from what its method leaves."""
    of_outputs: OutputCost | None = None
    """Cost by what the whole model says when this layer alone is packed; needs text."""

    def __post_init__(self) -> None:
        assert not (self.of_residual and self.of_outputs), f"{self.name}: two costs"

    @property
    def measured(self) -> bool:
        """Whether a table of costs decides."""
        return self.of_residual is not None or self.of_outputs is not None

    @property
    def reads_text(self) -> bool:
        """Whether it needs text, whatever the method needs."""
        return self.of_outputs is not None
