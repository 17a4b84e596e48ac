"""Refinement of a written output: two models pass through their blocks, adapters follow."""

from loftq.integrations.refine.output import (
    Refining,
    forget,
    is_begun,
    is_pending,
    mark,
    refine_output,
    written_result,
)
from loftq.integrations.refine.run import Listener, Step, refine_adapter

__all__ = [
    "Listener",
    "Refining",
    "Step",
    "forget",
    "is_begun",
    "is_pending",
    "mark",
    "refine_adapter",
    "refine_output",
    "written_result",
]
