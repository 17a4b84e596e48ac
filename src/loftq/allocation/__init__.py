"""Which format each layer gets: mixed precision by depth and by name pattern."""

from loftq.allocation.assign import PlacedLayer, assign_formats, first_k_blocks
from loftq.allocation.patterns import matches, unmatched

__all__ = ["PlacedLayer", "assign_formats", "first_k_blocks", "matches", "unmatched"]
