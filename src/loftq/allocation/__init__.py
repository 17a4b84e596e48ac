"""Which format and rank each layer gets: by depth, by measured cost and budget, by name."""

from loftq.allocation.assign import PlacedLayer, assign_formats, first_k_blocks
from loftq.allocation.base import Allocation
from loftq.allocation.choose import Candidate, Choice, Rival, choose
from loftq.allocation.error import ERROR, RELATIVE
from loftq.allocation.first import FIRST
from loftq.allocation.kl import KL
from loftq.allocation.knapsack import cheapest
from loftq.allocation.patterns import matches, unmatched
from loftq.allocation.table import CostTable

ALLOCATIONS: dict[str, Allocation] = {row.name: row for row in (FIRST, ERROR, RELATIVE, KL)}
MEASURED = tuple(name for name, row in ALLOCATIONS.items() if row.measured)
"""Those that go by a table of costs."""

__all__ = [
    "ALLOCATIONS",
    "MEASURED",
    "Allocation",
    "Candidate",
    "Choice",
    "CostTable",
    "PlacedLayer",
    "Rival",
    "assign_formats",
    "cheapest",
    "choose",
    "first_k_blocks",
    "matches",
    "unmatched",
]
