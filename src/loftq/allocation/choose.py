"""From a table of costs and a budget to a format per layer, and what simpler choices would cost."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass

from loftq.allocation.assign import PlacedLayer
from loftq.allocation.knapsack import cheapest

Sizes = Mapping[str, Mapping[str, int]]
"""module -> format -> packed bytes."""
Costs = Mapping[str, Mapping[str, float]]
"""module -> format -> cost."""


@dataclass(frozen=True, kw_only=True)
class Rival:
    """A choice that needs no table, at the same or fewer bytes."""

    name: str
    nbytes: int
    cost: float


@dataclass(frozen=True, kw_only=True)
class Choice:
    """The formats that were chosen, and what is known of them."""

    allocation: str
    """Row of the table of allocations."""
    budget: int
    """Most packed bytes of these layers, scales and zeros included."""
    nbytes: int
    """Packed bytes of the choice."""
    weights: int
    """Weights of these layers."""
    cost: float
    """Sum of the layers' costs."""
    formats: Mapping[str, str]
    """module -> format."""
    rivals: tuple[Rival, ...] = ()
    """Uniform formats that fit the budget, and the widest format for the first k blocks."""

    def to_dict(self) -> dict[str, object]:
        """JSON-ready."""
        return asdict(self)


def choose(
    layers: Sequence[PlacedLayer],
    sizes: Sizes,
    costs: Costs,
    *,
    budget: int,
    weights: int,
    allocation: str,
) -> Choice:
    """The cheapest formats within `budget` bytes, exactly.

    Args:
        layers: the layers that share the budget.
        sizes: packed bytes of each layer in each candidate format, the same formats for all.
        costs: of the same.
        budget: bytes.
        weights: of all layers together, for bits per weight.
        allocation: name of the row that measured.

    Raises:
        ValueError: the narrowest formats do not fit.
    """
    names = [layer.module for layer in layers]
    formats = list(sizes[names[0]])
    least = sum(min(sizes[name].values()) for name in names)
    if least > budget:
        raise ValueError(
            f"bits={8 * budget / weights:.4g}: the narrowest of {', '.join(formats)} take "
            f"{8 * least / weights:.4f} bits a weight, scales included. Raise bits, or name "
            "narrower formats with candidates=..."
        )
    at = cheapest(
        [[sizes[name][f] for f in formats] for name in names],
        [[costs[name][f] for f in formats] for name in names],
        budget,
    )
    chosen = {name: formats[k] for name, k in zip(names, at, strict=True)}
    return Choice(
        allocation=allocation,
        budget=budget,
        nbytes=_bytes(sizes, chosen),
        weights=weights,
        cost=_cost(costs, chosen),
        formats=chosen,
        rivals=_rivals(layers, formats, sizes, costs, budget),
    )


def _rivals(
    layers: Sequence[PlacedLayer], formats: Sequence[str], sizes: Sizes, costs: Costs, budget: int
) -> tuple[Rival, ...]:
    options = {f: {layer.module: f for layer in layers} for f in formats}
    bytes_of = {f: _bytes(sizes, option) for f, option in options.items()}
    narrow, wide = min(formats, key=bytes_of.__getitem__), max(formats, key=bytes_of.__getitem__)
    blocks = 1 + max((layer.depth for layer in layers if layer.depth is not None), default=-1)
    for k in range(blocks - 1, 0, -1):
        mixed = {
            layer.module: wide if layer.depth is not None and layer.depth < k else narrow
            for layer in layers
        }
        if _bytes(sizes, mixed) <= budget:
            options[f"{wide} in the first {k} of {blocks} blocks, else {narrow}"] = mixed
            break
    return tuple(
        Rival(name=name, nbytes=size, cost=_cost(costs, option))
        for name, option in options.items()
        if (size := _bytes(sizes, option)) <= budget
    )


def _bytes(sizes: Sizes, chosen: Mapping[str, str]) -> int:
    return sum(sizes[module][format] for module, format in chosen.items())


def _cost(costs: Costs, chosen: Mapping[str, str]) -> float:
    return sum(costs[module][format] for module, format in chosen.items())
