"""The descent: it goes down, keeps the best, and goes on after a stop as if there had been none."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from loftq.refine import REFINEMENTS, Descent, Stage, descend, find_refinement

BATCHES = (range(4), range(4, 6))


def problem(noise: float = 0.0) -> tuple[Tensor, Callable[[int], Tensor]]:
    """Least squares with a target of its own for each batch; one parameter of 3 numbers."""
    generator = torch.Generator().manual_seed(0)
    X = torch.randn(6, 8, 3, generator=generator)
    y = X @ torch.tensor([1.0, -2.0, 3.0]) + noise * torch.randn(6, 8, generator=generator)
    parameter = torch.zeros(3, requires_grad=True)
    return parameter, lambda number: (X[number] @ parameter - y[number]).square().mean()


def held_out(loss: Callable[[int], Tensor]) -> float:
    with torch.no_grad():
        return sum(loss(number).item() for number in BATCHES[1]) / len(BATCHES[1])


def test_the_loss_falls_and_what_is_kept_is_the_best_iterate() -> None:
    parameter, loss = problem(noise=0.5)
    found = descend([parameter], loss, BATCHES, Descent(epochs=30, rate=0.3, seed=0))
    assert found.best < 0.1 * found.start
    assert held_out(loss) == found.best == min(found.losses)
    assert len(found.losses) == 30


def test_no_step_leaves_the_start_untouched() -> None:
    parameter, loss = problem()
    found = descend([parameter], loss, BATCHES, Descent(epochs=0, rate=0.3, seed=0))
    assert not parameter.any()
    assert found.losses == ()
    assert found.best == found.start == held_out(loss)


def test_a_descent_that_only_harms_ends_at_its_start() -> None:
    parameter, loss = problem()
    with torch.no_grad():
        parameter.copy_(torch.tensor([1.0, -2.0, 3.0]))  # the solution
    found = descend([parameter], lambda n: loss(n) + 1, BATCHES, Descent(epochs=1, rate=5, seed=0))
    assert parameter.tolist() == [1.0, -2.0, 3.0]
    assert found.best == found.start


@pytest.mark.parametrize("stop", [1, 3])
def test_a_stopped_descent_goes_on_to_the_same_end(stop: int) -> None:
    how = Descent(epochs=5, rate=0.1, seed=7)
    whole, loss = problem(noise=0.5)
    expected = descend([whole], loss, BATCHES, how)
    states: list[dict] = []

    def keep(state: dict) -> None:
        states.append(torch.load(written(state), weights_only=True))
        if len(states) == stop:
            raise KeyboardInterrupt

    part, loss = problem(noise=0.5)
    with pytest.raises(KeyboardInterrupt):
        descend([part], loss, BATCHES, how, keep=keep)
    again, loss = problem(noise=0.5)
    found = descend([again], loss, BATCHES, how, state=states[-1])
    assert found == expected  # all but the seconds
    assert torch.equal(again, whole)


def written(state: dict) -> object:
    import io

    buffer = io.BytesIO()
    torch.save(state, buffer)
    buffer.seek(0)
    return buffer


def test_a_loss_that_is_not_finite_is_refused() -> None:
    parameter, _ = problem()
    with pytest.raises(ValueError, match=r"became nan after 0 of 4 steps .* refine=none"):
        descend(
            [parameter],
            lambda number: parameter.sum() * torch.nan,
            BATCHES,
            Descent(epochs=1, rate=0.1, seed=0),
        )


def test_passes_can_be_set_for_all_stages() -> None:
    chosen = find_refinement("block-distill").with_epochs(3)
    assert [stage.epochs for stage in chosen.stages] == [3, 3]
    assert find_refinement("block").with_epochs(None) is REFINEMENTS["block"]


def test_unknown_rows_and_senseless_stages_are_refused() -> None:
    with pytest.raises(ValueError, match="refine='blocks' does not exist; choose one of none, "):
        find_refinement("blocks")
    with pytest.raises(AssertionError, match="is weighted"):
        Stage(scope="model", epochs=1, rate=1e-3, batch=1)
