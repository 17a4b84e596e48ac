"""Weight to codes."""

from loftq.rounding.rtn import Rounded, round_to_nearest

__all__ = ["Rounded", "round_to_nearest"]
