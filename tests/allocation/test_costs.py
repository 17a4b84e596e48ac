"""Each cost is its equation, and a choice keeps to its budget."""

from dataclasses import replace
from typing import NamedTuple

import pytest
import torch

from layer_problem import statistics
from loftq.allocation import ALLOCATIONS, Candidate, choose
from loftq.allocation.kl import divergence
from loftq.methods import ProblemStatistics


class Layer(NamedTuple):
    module: str
    depth: int | None


def weights():
    generator = torch.Generator().manual_seed(3)
    return (torch.randn(96, 128, generator=generator) for _ in range(2))


def test_without_statistics_the_error_is_that_of_the_weights():
    E, W = weights()
    expected = E.double().norm().square().item()
    assert ALLOCATIONS["error"].of_residual(E, W, None) == pytest.approx(expected)
    share = expected / W.double().norm().square().item()
    assert ALLOCATIONS["relative"].of_residual(E, W, None) == pytest.approx(share)


def test_with_a_gram_it_is_the_mean_squared_error_of_the_outputs():
    E, W = weights()
    x = torch.randn(500, 128, generator=torch.Generator().manual_seed(4)).double()
    gram = (x.mT @ x / len(x))[None]
    known = ProblemStatistics(
        mean_square=gram.diagonal(dim1=1, dim2=2),
        largest_mean=x.abs().mean(0)[None],
        gram=gram,
        tokens=(500,),
        dropped=(0,),
    )
    left = (x @ E.double().mT).square().sum(1).mean().item()
    whole = (x @ W.double().mT).square().sum(1).mean().item()
    assert ALLOCATIONS["error"].of_residual(E, W, known) == pytest.approx(left)
    assert ALLOCATIONS["relative"].of_residual(E, W, known) == pytest.approx(left / whole)


def test_a_diagonal_counts_inputs_as_uncorrelated():
    E, W = weights()
    known = statistics(n=1)
    diagonal = ProblemStatistics(
        mean_square=known.mean_square,
        largest_mean=known.largest_mean,
        gram=None,
        tokens=known.tokens,
        dropped=known.dropped,
    )
    expected = (E.double().square() @ known.mean_square[0]).sum().item()
    assert ALLOCATIONS["error"].of_residual(E, W, diagonal) == pytest.approx(expected)


def test_with_fisher_means_it_is_weighted_by_the_rank_one_fisher():
    E, W = weights()
    known = statistics(n=1)
    rows, columns = known.fisher_rows[0], known.fisher_columns[0] * 2
    F = rows[:, None] * columns / rows.mean()
    torch.testing.assert_close(F.mean(0), columns)  # of which these are the column means
    known = replace(known, fisher_columns=columns[None])
    expected = (F * E.double().square()).sum().item()
    assert ALLOCATIONS["error"].of_residual(E, W, known) == pytest.approx(expected)


def test_the_divergence_is_torchs_and_zero_for_equal_outputs():
    generator = torch.Generator().manual_seed(5)
    p, q = torch.randn(2, 7, 11, generator=generator) * 3
    expected = torch.nn.functional.kl_div(
        q.log_softmax(-1), p.log_softmax(-1), reduction="sum", log_target=True
    )
    torch.testing.assert_close(divergence(p, q), expected)
    assert divergence(p, p + 2.0).abs() < 1e-5  # a constant changes no probability
    assert divergence(p, q) > 0


SIZES = {"nf2": 2, "nf3": 3, "nf4": 4}


def chosen(costs: dict[str, tuple[float, float, float]], budget: int):
    layers = [Layer(module, k) for k, module in enumerate(costs)]
    sizes = {Candidate(name): size for name, size in SIZES.items()}
    table = {module: dict(zip(sizes, row, strict=True)) for module, row in costs.items()}
    return choose(layers, dict.fromkeys(costs, sizes), table, budget=budget, weights=8 * len(costs),
                  allocation="error")  # fmt: skip


def test_bits_go_where_they_save_most():
    found = chosen({"a": (1, 0.9, 0.8), "b": (9, 2, 1), "c": (5, 4, 0.5)}, 9)
    assert found.formats == {"a": "nf2", "b": "nf3", "c": "nf4"}
    assert (found.nbytes, found.cost) == (9, 3.5)


def test_it_is_never_worse_than_a_rival_of_its_bytes():
    generator = torch.Generator().manual_seed(6)
    for budget in range(12, 25):
        costs = {str(k): tuple(torch.rand(3, generator=generator).tolist()) for k in range(6)}
        found = chosen(costs, budget)
        assert found.nbytes <= budget
        assert found.rivals
        for rival in found.rivals:
            assert rival.nbytes <= budget
            assert found.cost <= rival.cost + 1e-12


def test_rivals_are_uniform_formats_and_the_first_blocks():
    found = chosen({str(k): (3, 2, 1) for k in range(4)}, 13)
    assert [(rival.name, rival.nbytes, rival.cost) for rival in found.rivals] == [
        ("nf2", 8, 12),
        ("nf3", 12, 8),
        ("nf4 in the first 2 of 4 blocks, else nf2", 12, 8),
    ]


def test_a_budget_below_the_smallest_is_refused():
    with pytest.raises(ValueError, match=r"of 1.5 bits a weight: .* take 2.0000, .*candidates"):
        chosen({"a": (1, 1, 1), "b": (1, 1, 1)}, 3)


def test_ranks_are_chosen_with_formats_and_by_nobody_else():
    """Against every combination: two layers, two formats at two ranks each."""
    options = [Candidate(name, rank) for name in ("nf2", "nf4") for rank in (4, 8)]
    sizes = dict(zip(options, (3, 5, 6, 9), strict=True))
    costs = {
        "a": dict(zip(options, (9.0, 2.0, 8.0, 1.0), strict=True)),  # gains from rank
        "b": dict(zip(options, (9.0, 8.5, 2.5, 1.0), strict=True)),  # gains from bits
    }
    found = choose(
        [Layer("a", 0), Layer("b", 1)], dict.fromkeys(costs, sizes), costs,
        budget=12, weights=16, allocation="error",
    )  # fmt: skip
    every = [
        (costs["a"][x] + costs["b"][y], x, y)
        for x in options
        for y in options
        if sizes[x] + sizes[y] <= 12
    ]
    least, first, second = min(every)
    assert (found.cost, found.nbytes) == (least, 11)
    assert found.formats == {"a": first.format, "b": second.format} == {"a": "nf2", "b": "nf4"}
    assert found.ranks == {"a": first.rank, "b": second.rank} == {"a": 8, "b": 4}
    names = [rival.name for rival in found.rivals]
    assert names[:3] == ["nf2 at rank 4", "nf2 at rank 8", "nf4 at rank 4"]
    assert names[3] == "nf4 at rank 8 in the first 1 of 2 blocks, else nf2 at rank 4"
    assert chosen({"a": (3, 2, 1)}, 4).ranks == {}
