"""Statistics in sequence against forwards of two plain models; families are in test_sequential."""

import threading
from collections.abc import Sequence

import pytest
import torch
from torch import Tensor, nn

from loftq.calibration import InputStatistics, Recall, SequentialStatistics, TokenWindows, collect

WIDTH = 6


class Pair(nn.Module):
    """Two linears that read the same, and one that reads what comes of them."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = (nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.c(torch.tanh(self.a(x)) * self.b(x))


class Toy:
    """Embedding, two blocks, a linear after them."""

    device = torch.device("cpu")
    reenters = False
    blocks = ("blocks.0", "blocks.1")

    def __init__(self) -> None:
        torch.manual_seed(0)
        self.module = nn.Module()
        self.module.embed = nn.Embedding(20, WIDTH)
        self.module.blocks = nn.ModuleList([Pair(), Pair()])
        self.module.last = nn.Linear(WIDTH, WIDTH)
        self.log: list[str] = []

    def load(self, block: str) -> None:
        self.log.append(f"load {block}")

    def drop(self, block: str) -> None:
        self.log.append(f"drop {block}")

    def forward(self, ids: Tensor, mask: Tensor) -> Tensor:
        x = self.module.embed(ids)
        for block in self.module.blocks:
            x = block(x)
        return self.module.last(x)


LAYERS = {f"blocks.{k}.{name}": WIDTH for k in (0, 1) for name in "abc"}
BATCHES = tuple([f"blocks.{k}.{name}" for name in names] for k in (0, 1) for names in ("ab", "c"))


def windows(padded: bool = False) -> TokenWindows:
    ids = torch.arange(5 * 4).view(5, 4) % 20
    mask = torch.ones_like(ids, dtype=torch.bool)
    if padded:
        mask[2, 1:] = False
    return TokenWindows(ids=ids, mask=mask, source="toy")


def coarse(W: Tensor) -> Tensor:
    """Some other weight in place of W."""
    return (4 * W).round() / 4


def nothing(layer: str) -> None:
    """No layer was quantized by an earlier run."""


def inputs_of(model: Toy, layer: str, tokens: TokenWindows) -> Tensor:
    """What a layer reads, (tokens, WIDTH) float64, by a hook on a plain forward."""
    seen: list[Tensor] = []
    hook = model.module.get_submodule(layer).register_forward_pre_hook(
        lambda module, args: seen.append(args[0])
    )
    with torch.no_grad():
        model.forward(tokens.ids, tokens.mask)
    hook.remove()
    return seen[0][tokens.mask].double()


def in_sequence(
    model: Toy,
    tokens: TokenWindows,
    batches: Sequence[Sequence[str]] = BATCHES,
    recall: Recall = nothing,
) -> dict[str, InputStatistics]:
    known = SequentialStatistics(lambda: model, LAYERS, tokens, recall=recall, chunk=2)
    found: dict[str, InputStatistics] = {}
    for batch in batches:
        known.meet(batch)
        found |= {layer: known.read(layer, "gram") for layer in batch}
        for layer in batch:
            weight = model.module.get_parameter(f"{layer}.weight")
            known.settle(layer, lambda weight=weight: coarse(weight))
    known.close()
    return found


@pytest.mark.parametrize("padded", [False, True])
def test_each_batch_sees_all_before_it_quantized_and_the_original_beside(padded: bool) -> None:
    tokens = windows(padded)
    found, original, quantized = in_sequence(Toy(), tokens), Toy(), Toy()
    for batch in BATCHES:
        for layer in batch:
            x, x_hat = inputs_of(original, layer, tokens), inputs_of(quantized, layer, tokens)
            count = len(x)
            assert found[layer].tokens == count
            torch.testing.assert_close(found[layer].gram.double(), x_hat.mT @ x_hat / count)
            expected = (x - x_hat).mT @ x_hat / count
            torch.testing.assert_close(found[layer].drift.double(), expected, atol=1e-7, rtol=1e-4)
        for layer in batch:
            weight = quantized.module.get_parameter(f"{layer}.weight").data
            weight.copy_(coarse(weight))
    assert found["blocks.0.c"].drift.norm() > 0.01  # moved within the first block already


def test_before_anything_is_quantized_statistics_are_those_of_the_model() -> None:
    tokens, plain = windows(), {}
    collect(
        Toy(), LAYERS, tokens, "gram", on_block=lambda block, found, leaders: plain.update(found)
    )
    found = in_sequence(Toy(), tokens)
    for layer in ("blocks.0.a", "blocks.0.b"):
        torch.testing.assert_close(found[layer].gram, plain["blocks.0.a"].gram)
        assert not found[layer].drift.any()


def test_the_model_is_left_as_it_was() -> None:
    model = Toy()
    model.module.train()
    before = {name: weight.clone() for name, weight in model.module.named_parameters()}
    in_sequence(model, windows())
    assert model.module.training
    for name, weight in model.module.named_parameters():
        assert torch.equal(weight, before[name])
    assert not any(module._forward_pre_hooks for module in model.module.modules())
    assert [thread for thread in threading.enumerate() if thread.name == "calibrate"] == []
    assert model.log == ["load blocks.0", "drop blocks.0", "load blocks.1", "drop blocks.1"]


def test_a_forward_that_fails_at_the_start_leaves_the_model_as_it_was() -> None:
    model, forward, calls = Toy(), Toy.forward, []

    def third_fails(ids: Tensor, mask: Tensor) -> Tensor:
        calls.append(ids)
        if len(calls) == 3:
            raise RuntimeError("out of memory")
        return forward(model, ids, mask)

    model.forward = third_fails  # type: ignore[method-assign]
    known = SequentialStatistics(lambda: model, LAYERS, windows(), recall=nothing, chunk=2)
    with pytest.raises(RuntimeError, match="out of memory"):
        known.meet(BATCHES[0])
    assert not any(module._forward_pre_hooks for module in model.module.modules())
    assert [thread for thread in threading.enumerate() if thread.name == "calibrate"] == []


@pytest.mark.parametrize("done", [1, 2, 3])
def test_a_run_that_resumes_reads_the_layers_it_has_back(done: int) -> None:
    whole, model = in_sequence(Toy(), windows()), Toy()
    solved = {layer for batch in BATCHES[:done] for layer in batch}

    def recall(layer: str) -> Tensor | None:
        weight = model.module.get_parameter(f"{layer}.weight")
        return coarse(weight) if layer in solved else None

    found = in_sequence(model, windows(), BATCHES[done:], recall)
    for batch in BATCHES[done:]:
        for layer in batch:
            assert torch.equal(found[layer].gram, whole[layer].gram)
            assert torch.equal(found[layer].drift, whole[layer].drift)


def test_a_broken_token_is_left_out_of_both() -> None:
    model = Toy()
    model.module.embed.weight.data[3] = torch.nan
    found = in_sequence(model, windows())
    assert all(one.dropped == 1 and one.tokens == 19 for one in found.values())
    assert all(torch.isfinite(one.drift).all() for one in found.values())


@pytest.mark.parametrize(
    ("layers", "message"),
    [
        (["last"], r'last: lies outside of the blocks.*skip=\["last"\]'),
        (["blocks.1.d"], "blocks.1.d: no calibration token reached it"),
    ],
)
def test_what_has_no_place_in_the_sequence_is_refused(layers: list[str], message: str) -> None:
    model = Toy()
    model.module.blocks[1].d = nn.Linear(WIDTH, WIDTH)
    known = SequentialStatistics(
        lambda: model,
        {**LAYERS, "last": WIDTH, "blocks.1.d": WIDTH},
        windows(),
        recall=lambda layer: model.module.get_parameter(f"{layer}.weight").data,
    )
    with pytest.raises(ValueError, match=message):
        known.meet(layers)
    known.close()


def test_a_model_that_enters_its_blocks_several_times_is_refused() -> None:
    model = Toy()
    model.reenters = True
    known = SequentialStatistics(lambda: model, LAYERS, windows(), recall=nothing)
    with pytest.raises(ValueError, match=r"enters its blocks several times.*fast"):
        known.meet(BATCHES[0])
