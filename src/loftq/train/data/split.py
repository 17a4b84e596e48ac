"""Which samples are held out, and whether training saw them after all."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Iterable, Sequence
from typing import TypeVar

from loftq.train.data.problems import DataError

Item = TypeVar("Item")


def hold_out(
    items: Sequence[Item], share: float, *, seed: int, source: str
) -> tuple[list[Item], list[Item]]:
    """Training and held-out items, each in their old order.

    Args:
        items: at least two.
        share: of the items that is held out, rounded, at least one item and never all.
        seed: which ones.
        source: for the message.

    Raises:
        DataError: fewer than two items.
    """
    if len(items) < 2:
        raise DataError(
            f"{source}: one sample cannot be split into training and held-out samples. Give more "
            "rows, or validation data of its own."
        )
    size = min(max(1, round(share * len(items))), len(items) - 1)
    chosen = set(random.Random(seed).sample(range(len(items)), size))
    train = [item for n, item in enumerate(items) if n not in chosen]
    return train, [items[n] for n in sorted(chosen)]


def seen_in_training(train: Iterable[bytes], held: Iterable[bytes]) -> int:
    """How many held-out items are byte for byte among the training items."""
    seen = {hashlib.blake2b(item, digest_size=16).digest() for item in train}
    return sum(hashlib.blake2b(item, digest_size=16).digest() in seen for item in held)
