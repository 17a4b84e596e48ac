"""A launch that starts while the kernel before it ends (programmatic dependent launch).

Every kernel that may overlap waits (`gdc_wait`) before it reads or writes what another one wrote
or reads: then a kernel that is over has seen all those before it end, however many overlap. It
lets the next one start (`gdc_launch_dependents`) when its own sums are done: sooner, a Llama's
token took 4.7 ms instead of 4.3, as programs that wait keep their place on a multiprocessor.
"""

from __future__ import annotations

from typing import Any

SOONER = False
"""Whether the kernels before a packed product let it start at their start: it fetches its first
tiles while they work. To be measured with the product in CUDA C++."""


def options(overlap: bool) -> dict[str, Any]:
    """Keywords of a launch: the kernel's OVERLAP, and Triton's own where it is on."""
    return {"OVERLAP": True, "launch_pdl": True} if overlap else {"OVERLAP": False}


def before_a_product(overlap: bool) -> dict[str, Any]:
    """The same of a kernel that a packed product follows; OVERLAP is 2 where it lets it start at
    its start."""
    return {"OVERLAP": 2, "launch_pdl": True} if overlap and SOONER else options(overlap)
