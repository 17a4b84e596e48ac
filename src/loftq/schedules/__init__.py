"""How rounding and correction take turns."""

from loftq.schedules.alternate import KEEP, ORDERS, Alternation, Quantize, alternate, frobenius
from loftq.schedules.preserve import preserve
from loftq.schedules.projection import project

__all__ = [
    "KEEP",
    "ORDERS",
    "Alternation",
    "Quantize",
    "alternate",
    "frobenius",
    "preserve",
    "project",
]
