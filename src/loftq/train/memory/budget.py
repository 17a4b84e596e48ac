"""What "8GB" leaves for a training step.

A card is sold by a round number that its memory is near: a "24 GB" card has 24 GiB, some less what
the system reserves. torch's allocations share it with the CUDA context and with what the allocator
holds without using it. So of the number given, taken as 10^9 bytes, CONTEXT and a share for
fragmentation are set aside; the rest is what max_memory_allocated may reach. On a CPU the heap of
the C library keeps freed blocks: a process takes up to 1.7 times its tensors (docs/memory.md).
"""

from __future__ import annotations

import re

CONTEXT = 500_000_000
"""CUDA context, cuBLAS workspace and compiled kernels; 0.4 to 0.6 GB on current cards."""
FRAGMENTATION = 0.04
"""Share that the caching allocator holds without using it."""
HEAP = 0.4
"""Share of a process on a CPU that its heap keeps without using it, measured with glibc."""
UNITS = {"": 1, "B": 1, "KB": 1e3, "MB": 1e6, "GB": 1e9, "TB": 1e12,
         "KIB": 2**10, "MIB": 2**20, "GIB": 2**30, "TIB": 2**40}  # fmt: skip
_SIZE = re.compile(r"\s*(\d+(?:\.\d+)?)\s*([a-zA-Z]*)\s*")


def parse_size(text: str) -> int:
    """Bytes of "8GB", "7.5GiB", "800 MB".

    Raises:
        ValueError: no such size.
    """
    match = _SIZE.fullmatch(text)
    unit = match[2].upper() if match else ""
    if match is None or unit not in UNITS or not unit or float(match[1]) <= 0:
        raise ValueError(
            f"memory {text!r}: not a size. Write a number with its unit, such as 8GB, 7.5GiB or "
            "800MB."
        )
    return int(float(match[1]) * UNITS[unit])


def usable(size: int, device: str) -> int:
    """Bytes that tensors may take of a card, or of memory given to a process on the CPU."""
    if device == "cpu":
        return int(size * (1 - HEAP))
    return int((size - CONTEXT) * (1 - FRAGMENTATION))
