"""From a table of costs and a budget to a format and rank per layer, and simpler choices beside."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import NamedTuple

from loftq.allocation.assign import PlacedLayer
from loftq.allocation.knapsack import cheapest


class Candidate(NamedTuple):
    """What a layer may be stored as."""

    format: str
    rank: int | None = None
    """Of its adapter; None where ranks are not chosen."""

    def __str__(self) -> str:
        return self.format if self.rank is None else f"{self.format} at rank {self.rank}"


Sizes = Mapping[str, Mapping[Candidate, int]]
"""module -> candidate -> bytes that count in the budget."""
Costs = Mapping[str, Mapping[Candidate, float]]
"""module -> candidate -> cost."""


@dataclass(frozen=True, kw_only=True)
class Rival:
    """A choice that needs no table, at the same or fewer bytes."""

    name: str
    nbytes: int
    cost: float


@dataclass(frozen=True, kw_only=True)
class Choice:
    """The formats and ranks that were chosen, and what is known of them."""

    allocation: str
    """Row of the table of allocations."""
    budget: int
    """Most bytes of these layers: packed, scales and zeros included, and the adapters' where ranks
    are chosen."""
    nbytes: int
    """Bytes of the choice, counted in the same way."""
    weights: int
    """Weights of these layers."""
    cost: float
    """Sum of the layers' costs."""
    formats: Mapping[str, str]
    """module -> format."""
    ranks: Mapping[str, int]
    """module -> rank; empty where all layers have the configured one."""
    rivals: tuple[Rival, ...] = ()
    """Uniform candidates that fit the budget, and the largest for the first k blocks."""

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
    """The cheapest formats and ranks within `budget` bytes, exactly.

    Args:
        layers: the layers that share the budget.
        sizes: bytes of each layer as each candidate, the same candidates for all.
        costs: of the same.
        budget: bytes.
        weights: of all layers together, for bits per weight.
        allocation: name of the row that measured.

    Raises:
        ValueError: the smallest candidates do not fit.
    """
    names = [layer.module for layer in layers]
    options = list(sizes[names[0]])
    least = sum(min(sizes[name].values()) for name in names)
    if least > budget:
        raise ValueError(
            f"a budget of {8 * budget / weights:.4g} bits a weight: the smallest of "
            f"{', '.join(map(str, options))} take {8 * least / weights:.4f}, all told. Raise bits, "
            "or name narrower formats with candidates=..."
        )
    at = cheapest(
        [[sizes[name][option] for option in options] for name in names],
        [[costs[name][option] for option in options] for name in names],
        budget,
    )
    chosen = {name: options[k] for name, k in zip(names, at, strict=True)}
    return Choice(
        allocation=allocation,
        budget=budget,
        nbytes=_bytes(sizes, chosen),
        weights=weights,
        cost=_cost(costs, chosen),
        formats={name: option.format for name, option in chosen.items()},
        ranks={name: o.rank for name, o in chosen.items() if o.rank is not None},
        rivals=_rivals(layers, options, sizes, costs, budget),
    )


def _rivals(
    layers: Sequence[PlacedLayer],
    options: Sequence[Candidate],
    sizes: Sizes,
    costs: Costs,
    budget: int,
) -> tuple[Rival, ...]:
    simple = {str(o): {layer.module: o for layer in layers} for o in options}
    bytes_of = {o: _bytes(sizes, simple[str(o)]) for o in options}
    small, large = min(options, key=bytes_of.__getitem__), max(options, key=bytes_of.__getitem__)
    blocks = 1 + max((layer.depth for layer in layers if layer.depth is not None), default=-1)
    for k in range(blocks - 1, 0, -1):
        mixed = {
            layer.module: large if layer.depth is not None and layer.depth < k else small
            for layer in layers
        }
        if _bytes(sizes, mixed) <= budget:
            simple[f"{large} in the first {k} of {blocks} blocks, else {small}"] = mixed
            break
    return tuple(
        Rival(name=name, nbytes=size, cost=_cost(costs, option))
        for name, option in simple.items()
        if (size := _bytes(sizes, option)) <= budget
    )


def _bytes(sizes: Sizes, chosen: Mapping[str, Candidate]) -> int:
    return sum(sizes[module][option] for module, option in chosen.items())


def _cost(costs: Costs, chosen: Mapping[str, Candidate]) -> float:
    return sum(costs[module][option] for module, option in chosen.items())
