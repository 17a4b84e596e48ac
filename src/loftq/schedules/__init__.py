"""How rounding and correction take turns."""

from loftq.schedules.alternate import KEEP, ORDERS, Alternation, alternate

__all__ = ["KEEP", "ORDERS", "Alternation", "alternate"]
