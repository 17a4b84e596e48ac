"""What is done to a weight before it is rounded."""

from loftq.transforms.magr import largest_prox, magr
from loftq.transforms.rotation import ROTATIONS, largest_block, rotate_gram, rotated

__all__ = ["ROTATIONS", "largest_block", "largest_prox", "magr", "rotate_gram", "rotated"]
