"""How forwards are suspended and moved, on a model made for it; families are in integrations."""

import threading
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from loftq.calibration import OUTSIDE, InputStatistics, TokenWindows, collect, layers_in

WIDTH = 6


class Toy:
    """Embedding, blocks of one linear each in a given order, and a linear after them."""

    device = torch.device("cpu")

    def __init__(self, order: tuple[int, ...]) -> None:
        torch.manual_seed(0)
        self.order = order
        self.module = nn.Module()
        self.module.embed = nn.Embedding(20, WIDTH)
        linears = [nn.Sequential(nn.Linear(WIDTH, WIDTH)) for _ in set(order)]
        self.module.blocks = nn.ModuleList(linears)
        self.module.last = nn.Linear(WIDTH, WIDTH)
        self.blocks = tuple(f"blocks.{k}" for k in range(len(linears)))
        self.log: list[str] = []
        self.reenters = len(order) > len(self.blocks)

    def load(self, block: str) -> None:
        self.log.append(f"load {block}")

    def drop(self, block: str) -> None:
        self.log.append(f"drop {block}")

    def forward(self, ids: Tensor, mask: Tensor) -> Tensor:
        x = self.module.embed(ids)
        for k in self.order:
            x = self.module.blocks[k](x)
        return self.module.last(x)


def windows(rows: int = 5) -> TokenWindows:
    ids = torch.arange(rows * 4).view(rows, 4) % 20
    return TokenWindows(ids=ids, mask=torch.ones_like(ids, dtype=torch.bool), source="toy")


def run(
    model: Toy, layers: list[str], skip: Callable[[str], bool] = lambda block: False
) -> dict[str, InputStatistics]:
    found: dict[str, InputStatistics] = {}
    collect(
        model,
        dict.fromkeys(layers, WIDTH),
        windows(),
        "gram",
        on_block=lambda block, statistics, leaders: found.update(statistics),
        skip=skip,
        chunk=2,
    )
    return found


def test_a_block_is_loaded_once_for_all_chunks_and_dropped_before_the_next() -> None:
    model = Toy((0, 1))
    run(model, ["blocks.0.0", "blocks.1.0", "last"])
    assert model.log == ["load blocks.0", "drop blocks.0", "load blocks.1", "drop blocks.1"]


def test_a_block_that_is_entered_twice_counts_both_times() -> None:
    found = run(Toy((0, 0, 1)), ["blocks.0.0"])
    assert found["blocks.0.0"].tokens == 2 * 20


def test_layers_outside_of_the_blocks_are_seen_too() -> None:
    model = Toy((0, 1))
    with torch.no_grad():
        x = model.module.embed(windows().ids)
        for block in model.module.blocks:
            x = block(x)
    found = run(model, ["last", "blocks.0.0"])["last"]
    flat = x.view(-1, WIDTH)
    assert torch.allclose(found.gram, flat.T @ flat / len(flat), atol=1e-5)


def test_nothing_is_run_beyond_the_last_block_that_is_wanted() -> None:
    model = Toy((0, 1, 2))
    run(model, ["blocks.0.0", "blocks.1.0"], skip=lambda block: block == "blocks.1")
    assert model.log == ["load blocks.0", "drop blocks.0"]


def test_no_thread_and_no_hook_is_left() -> None:
    model, before = Toy((0, 1)), threading.active_count()
    run(model, ["blocks.0.0"])
    assert threading.active_count() == before
    assert not any(module._forward_pre_hooks for module in model.module.modules())


def test_a_failure_in_one_chunk_ends_the_others() -> None:
    model, before = Toy((0, 1)), threading.active_count()
    broken = windows()
    broken.ids[4, 0] = 99
    with pytest.raises(IndexError):
        collect(model, {"blocks.0.0": WIDTH}, broken, "gram", on_block=lambda *_: None, chunk=2)
    assert threading.active_count() == before


def test_layers_are_told_apart_by_whole_names() -> None:
    layers = {"b.1.x": 1, "b.10.x": 2, "c.x": 3}
    assert layers_in("b.1", layers, ("b.1", "b.10")) == {"b.1.x": 1}
    assert layers_in(OUTSIDE, layers, ("b.1", "b.10")) == {"c.x": 3}


class Positions(Toy):
    """Sends a table of relative positions through a projection after the tokens: DeBERTa."""

    def __init__(self, table: Tensor) -> None:
        super().__init__((0,))
        self.table = table

    def forward(self, ids: Tensor, mask: Tensor) -> Tensor:
        linear = self.module.blocks[0]

        def attend(module: nn.Module, args: tuple[Tensor], output: Tensor) -> Tensor:
            hook.remove()
            linear[0](self.table)
            return output

        hook = linear[0].register_forward_hook(attend)
        return linear(self.module.embed(ids))


@pytest.mark.parametrize("shape", [(1, 8), (2, 4), (1, 4)])
def test_a_table_of_positions_does_not_count_as_tokens(shape: tuple[int, int]) -> None:
    """Not even one with a row for each token of a chunk: two windows of 4, and a last one of 4."""
    found = run(Positions(1e3 * torch.ones(*shape, WIDTH)), ["blocks.0.0"])["blocks.0.0"]
    plain = run(Toy((0,)), ["blocks.0.0"])["blocks.0.0"]
    assert found.tokens == 20
    assert torch.equal(found.gram, plain.gram)


def test_tokens_in_one_list_count_too() -> None:
    class Flat(Toy):
        def forward(self, ids: Tensor, mask: Tensor) -> Tensor:
            return self.module.blocks[0](self.module.embed(ids).flatten(0, 1))

    found = run(Flat((0,)), ["blocks.0.0"])["blocks.0.0"]
    assert torch.equal(found.gram, run(Toy((0,)), ["blocks.0.0"])["blocks.0.0"].gram)
