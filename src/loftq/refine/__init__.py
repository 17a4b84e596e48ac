"""Gradient polish of the adapters of a layer, a block or a whole model."""

from loftq.refine.descent import Batches, Descent, Progress, Trajectory, descend
from loftq.refine.losses import hidden_error, mean_divergence, next_token_loss, squared_error
from loftq.refine.natural import NaturalStep
from loftq.refine.rows import REFINEMENTS, Refinement, Stage, find_refinement

__all__ = [
    "REFINEMENTS",
    "Batches",
    "Descent",
    "NaturalStep",
    "Progress",
    "Refinement",
    "Stage",
    "Trajectory",
    "descend",
    "find_refinement",
    "hidden_error",
    "mean_divergence",
    "next_token_loss",
    "squared_error",
]
