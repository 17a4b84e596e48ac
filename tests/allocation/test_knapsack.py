"""The knapsack is exact: it agrees with trying everything."""

from itertools import product

import numpy as np
import pytest

from loftq.allocation import cheapest


def spent(table, chosen):
    return sum(row[k] for row, k in zip(table, chosen, strict=True))


def by_trying(sizes, costs, budget):
    """Least cost of all choices that fit."""
    every = product(*(range(len(row)) for row in sizes))
    return min(spent(costs, x) for x in every if spent(sizes, x) <= budget)


@pytest.mark.parametrize("seed", range(60))
def test_it_finds_what_trying_everything_finds(seed):
    rng = np.random.default_rng(seed)
    items = int(rng.integers(1, 7))
    widths = [int(rng.integers(1, 5)) for _ in range(items)]
    sizes = [rng.integers(1, 40, n).tolist() for n in widths]
    costs = [np.round(rng.normal(0, 3, n), 3).tolist() for n in widths]  # negative and equal too
    least, most = sum(map(min, sizes)), sum(map(max, sizes))
    for budget in {least, least + 1, (least + most) // 2, most, most + 5}:
        chosen = cheapest(sizes, costs, budget)
        assert spent(sizes, chosen) <= budget
        assert spent(costs, chosen) == pytest.approx(by_trying(sizes, costs, budget), abs=1e-9)


def test_the_worked_case():
    assert cheapest([(1, 2), (1, 2)], [(5, 1), (4, 3)], 3) == [1, 0]


def test_greed_by_gain_per_byte_would_be_wrong():
    # The best ratio (10 for 6 bytes) leaves no room for the pair that gains 12 for 10.
    sizes, costs = [(0, 6), (0, 5), (0, 5)], [(10, 0), (6, 0), (6, 0)]
    assert cheapest(sizes, costs, 10) == [0, 1, 1]


def test_a_model_is_solved_exactly_to_the_byte():
    """Against an integer program of another make, on the shapes of SmolLM2-135M."""
    optimize = pytest.importorskip("scipy.optimize")
    rng = np.random.default_rng(0)
    shapes = [(576, 576), (192, 576), (192, 576), (576, 576)] + [(1536, 576)] * 3
    weights = np.array([rows * columns for rows, columns in shapes * 8])
    sizes = np.outer(weights, (2, 3, 4)) // 8 + np.array([17, 18, 19])
    costs = rng.gamma(1.0, size=sizes.shape) * np.array([1.0, 0.25, 0.06])
    budget = int(2.5 * weights.sum() / 8)
    chosen = cheapest(sizes.tolist(), costs.tolist(), budget)
    one = np.kron(np.eye(len(sizes)), np.ones(3))
    found = optimize.milp(
        costs.ravel(),
        integrality=np.ones(costs.size),
        bounds=optimize.Bounds(0, 1),
        constraints=[
            optimize.LinearConstraint(one, 1, 1),
            optimize.LinearConstraint(sizes.ravel()[None], ub=budget),
        ],
        options={"mip_rel_gap": 0.0},
    )
    assert spent(sizes, chosen) <= budget
    assert spent(costs, chosen) == pytest.approx(found.fun, rel=1e-6)


def test_what_cannot_be_is_said():
    with pytest.raises(ValueError, match=r"budget=4 bytes: the least .* is 5"):
        cheapest([(3, 4), (2,)], [(1, 1), (1,)], 4)
    with pytest.raises(ValueError, match="not finite"):
        cheapest([(3, 4)], [(1, float("nan"))], 4)
