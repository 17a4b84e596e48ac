"""What is done to a weight before it is rounded."""

from loftq.transforms.magr import largest_prox, magr

__all__ = ["largest_prox", "magr"]
