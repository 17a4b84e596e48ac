"""The multiple-choice knapsack, exactly: one choice an item, least cost under a byte budget."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np


def cheapest(
    sizes: Sequence[Sequence[int]], costs: Sequence[Sequence[float]], budget: int
) -> list[int]:
    """The choices x that minimise sum_i costs[i][x_i] with sum_i sizes[i][x_i] <= budget.

    Dynamic programming over undominated totals: after each item only those (bytes, cost) are kept
    that no other total beats in both, so that the answer is the optimum and not a relaxation. The
    totals of a model fall on few values, as shapes repeat: 210 layers in 3 formats leave some
    thousands.

    Two items, sizes (1, 2) each, costs (5, 1) and (4, 3), budget 3: the totals after both are (2,
    9), (3, 5) and (4, 4); the answer is [1, 0].

    Args:
        sizes: bytes of each choice of each item, at least one choice each.
        costs: in any unit, finite, the shape of `sizes`.
        budget: bytes.

    Returns:
        The index of the choice of each item. Of equal costs the fewer bytes, then the earlier.

    Raises:
        ValueError: nothing fits, or a cost is not finite.
    """
    least = [min(row) for row in sizes]
    if sum(least) > budget:
        raise ValueError(
            f"budget={budget} bytes: the least that these choices take is {sum(least)}."
        )
    if not all(np.isfinite(row).all() for row in costs):
        raise ValueError("costs: a cost is not finite, so that choices cannot be compared.")
    room = budget - sum(least)  # for what choices take above the least of each item
    taken, cost = np.zeros(1, np.int64), np.zeros(1)
    trail: list[tuple[np.ndarray, np.ndarray]] = []
    for size, price, low in zip(sizes, costs, least, strict=True):
        extra = np.asarray(size, np.int64) - low
        total = (taken[:, None] + extra).ravel()
        summed = (cost[:, None] + np.asarray(price, np.float64)).ravel()
        order = np.lexsort((summed, total))
        order = order[total[order] <= room]
        best = np.minimum.accumulate(summed[order])
        kept = order[np.r_[True, best[1:] < best[:-1]]]
        taken, cost = total[kept], summed[kept]
        trail.append((kept // len(extra), kept % len(extra)))
    at, chosen = len(cost) - 1, []  # undominated: the last one costs least
    for parent, choice in reversed(trail):
        chosen.append(int(choice[at]))
        at = int(parent[at])
    return chosen[::-1]
