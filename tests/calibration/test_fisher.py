"""Fisher means: the squares of gradients, per weight in float64, and their two means."""

from pathlib import Path

import pytest
import torch
from torch import nn

from loftq.calibration import Fisher, FisherStore, InputStatistics, collect_fisher


class Transposed(nn.Module):
    """y = x W + 0, W stored (in, out) as GPT-2's Conv1D does."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(7, 4, generator=torch.Generator().manual_seed(2)))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x @ self.weight


@pytest.fixture
def model() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 7), nn.Tanh(), Transposed(), nn.Linear(4, 1))


def losses(model: nn.Module, n: int = 3) -> list:
    x = torch.randn(n, 6, 5, generator=torch.Generator().manual_seed(1))
    return [lambda one=one: model(one).square().mean() for one in x]


def test_the_means_are_those_of_the_squared_gradients_of_each_loss(model: nn.Sequential) -> None:
    found = collect_fisher(model, losses(model), {"0": False, "2": True})
    for path, weight in (("0", model[0].weight), ("2", model[2].weight)):
        grads = [torch.autograd.grad(loss(), weight)[0].double() for loss in losses(model)]
        F = sum(g.square() for g in grads) / len(grads)
        F = F.mT if path == "2" else F
        torch.testing.assert_close(found[path].rows, F.mean(1))
        torch.testing.assert_close(found[path].columns, F.mean(0))


def test_the_model_is_left_as_it_was(model: nn.Sequential) -> None:
    model[3].weight.requires_grad_(False)
    model[0].weight.grad = torch.ones_like(model[0].weight)
    collect_fisher(model, losses(model), {"0": False})
    assert [p.requires_grad for p in model.parameters()] == [True, True, True, False, True]
    assert torch.equal(model[0].weight.grad, torch.ones_like(model[0].weight))
    assert model[2].weight.grad is None
    model(torch.ones(1, 5)).sum().backward()  # no hook is left to take the gradient away
    assert model[2].weight.grad is not None


def test_a_layer_without_a_finite_gradient_is_named(model: nn.Sequential) -> None:
    half = [lambda: model[0](torch.ones(1, 5)).sum()]
    with pytest.raises(ValueError, match="3: no loss depends on it"):
        collect_fisher(model, half, {"0": False, "3": False})
    large = [lambda: model(torch.ones(1, 5)).sum() * float("inf")]
    with pytest.raises(ValueError, match="0: a gradient is not finite"):
        collect_fisher(model, large, {"0": False})


def test_the_store_gives_them_with_the_diagonal_of_the_inputs(tmp_path: Path) -> None:
    store = FisherStore(tmp_path, "name")
    assert not store.holds_fisher(["block.q"])
    inputs = InputStatistics(
        mean_square=torch.rand(3).double(), largest_mean=torch.rand(3).double(), gram=None, tokens=9
    )
    store.write("block", {"block.q": inputs}, {"block.q": "block.q"})
    means = Fisher(rows=torch.rand(2).double(), columns=torch.rand(3).double())
    store.write_fisher({"block.q": means})
    assert FisherStore(tmp_path, "name").holds_fisher(["block.q"])
    assert not store.holds_fisher(["block.q", "block.k"])
    found = store.read("block.q", "fisher")
    assert torch.equal(found.mean_square, inputs.mean_square)
    assert torch.equal(found.fisher_rows, means.rows)
    assert torch.equal(found.fisher_columns, means.columns)
    assert store.read("block.q", "diagonal").fisher_rows is None
