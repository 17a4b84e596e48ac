"""Pairs of counters in GPU memory that a launch finds at zero and leaves at zero.

Launches that may run at the same time need pairs of their own. A launch outside of a graph takes
the next of a ring, which comes round after so many launches that the last user is over. One that
is captured keeps its pair for ever, because the graph may be replayed beside anything.
"""

from __future__ import annotations

import torch

ROUND, KEPT = 4096, 65536  # pairs for launches outside of graphs; pairs for captured ones
BYTES = 8


class _Pool:
    def __init__(self, device: torch.device) -> None:
        self.memory = torch.zeros(2 * (ROUND + KEPT), dtype=torch.int32, device=device)
        self.turn = self.kept = 0

    def take(self, keep: bool) -> int:
        if keep:
            self.kept += 1
            if self.kept > KEPT:
                raise RuntimeError(f"more than {KEPT} products were captured into CUDA graphs.")
            return self.memory.data_ptr() + BYTES * (ROUND + self.kept - 1)
        self.turn = (self.turn + 1) % ROUND
        return self.memory.data_ptr() + BYTES * self.turn


_pools: dict[torch.device, _Pool] = {}


def counters(device: torch.device, capturing: bool) -> int:
    """Address of a pair of 32-bit counters, both 0; `capturing` into a graph: never given again.

    Raises:
        RuntimeError: the first call for a device is made while capturing (the zeros would be
            written by each replay only), or too many were captured.
    """
    if device not in _pools:
        if capturing:
            raise RuntimeError("run the product once before it is captured into a CUDA graph.")
        _pools[device] = _Pool(device)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
    return _pools[device].take(capturing)
