"""Refinement of a written output: two models pass through their blocks, adapters follow."""

from loftq.integrations.refine.run import Listener, Step, refine_adapter

__all__ = ["Listener", "Step", "refine_adapter"]
