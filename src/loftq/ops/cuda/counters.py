"""Pairs of counters in GPU memory that a launch finds at zero and leaves at zero.

Launches that may run at the same time need pairs of their own. A launch outside of a graph takes
the next of a ring, which comes round after so many launches that the last user is over. One that
is captured keeps its pair for ever, because the graph may be replayed beside anything; when these
are used up, its graph sets a pair to zero each time.
"""

from __future__ import annotations

import torch
from torch import Tensor

ROUND, KEPT = 4096, 65536  # pairs for launches outside of graphs; pairs for captured ones


class _Pool:
    def __init__(self, device: torch.device) -> None:
        self.pairs = torch.zeros(ROUND + KEPT, 2, dtype=torch.int32, device=device)
        self.turn, self.kept = 0, 0
        if device.type == "cuda":
            torch.cuda.synchronize(device)  # other streams find zeros


_pools: dict[torch.device, _Pool] = {}


def counters(device: torch.device, capturing: bool) -> Tensor:
    """Two int32 counters, both 0.

    Args:
        device: of the launch.
        capturing: into a CUDA graph.
    """
    pool = _pools.get(device)
    if capturing and (pool is None or pool.kept == KEPT):
        return torch.zeros(2, dtype=torch.int32, device=device)
    if pool is None:
        pool = _pools[device] = _Pool(device)
    if capturing:
        pool.kept += 1
        return pool.pairs[ROUND + pool.kept - 1]
    pool.turn = (pool.turn + 1) % ROUND
    return pool.pairs[pool.turn]
