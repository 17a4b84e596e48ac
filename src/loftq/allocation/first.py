"""First k blocks at 4 bits, the rest at 2 (LoftQ, arXiv:2310.08659, Table 5); nothing measured."""

from loftq.allocation.base import Allocation

FIRST = Allocation(
    name="first",
    paper="2310.08659",
    summary="the first blocks at 4 bits, the rest at 2, by depth alone.",
)
