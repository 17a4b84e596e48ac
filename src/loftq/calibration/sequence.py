"""Statistics in sequence: what a layer reads once everything before it has been quantized.

Two copies of every forward move through the model side by side. The first keeps the original
weights and meets the inputs x that each layer was trained on; the second has the quantized weights,
corrections included, wherever a layer is done, and meets x_hat. For the layers whose turn it is

    gram    E[x_hat x_hat^T]            drift    E[(x - x_hat) x_hat^T]

are taken: the inputs to be quantized for, and how far they have moved from the original ones
(methods/target.py; QEP, arXiv:2504.09629; GPTAQ, arXiv:2504.02692).

Forwards wait in threads at the entrance of a block, as in collect.py. There each can *rehearse* the
block: run it and throw the result away, so that the inputs of its layers are seen as often as some
of them have been quantized. A rehearsal ends at the last layer that is looked at. The device holds
one block in both versions and the hidden states of all tokens twice.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from loftq.calibration.accumulators import InputStatistics, PairAccumulator
from loftq.calibration.collect import (
    BlockModel,
    Run,
    advance,
    call_again,
    layers_in,
    means_of,
    of_tokens,
    standing,
)
from loftq.calibration.data import TokenWindows

OnBlock = Callable[[str, int, int], object]
"""Called when a block is left: its path, blocks done, blocks in all."""


Recall = Callable[[str], Tensor | None]
"""What a layer computes with that an earlier run has quantized, in its module's orientation; None
for all others."""


class SequentialStatistics:
    """Statistics of a model that is being quantized, in the order of its forward.

    For each batch of layers: `meet` it, `read` each of its layers, quantize, `settle` each. All
    layers of a batch lie in one block, and blocks follow in the order of the forward.

    Args:
        open_model: makes the model; called at the first `meet`, by the thread that goes on.
        layers: module path -> in_features of all layers that are or were quantized.
        windows: the tokens.
        recall: gives the layers that an earlier run has quantized.
        on_block: progress.
        chunk: windows in one forward.
    """

    def __init__(
        self,
        open_model: Callable[[], BlockModel],
        layers: Mapping[str, int],
        windows: TokenWindows,
        *,
        recall: Recall,
        on_block: OnBlock = lambda path, done, total: None,
        chunk: int = 4,
    ) -> None:
        self.open_model, self.layers, self.windows = open_model, dict(layers), windows
        self.recall, self.on_block, self.chunk = recall, on_block, chunk
        self._stage: _Stage | None = None
        self._found: dict[str, InputStatistics] = {}

    def meet(self, layers: Sequence[str]) -> None:
        """Take the statistics of a batch, with all that was settled in place.

        Raises:
            ValueError: a layer outside of the blocks, one that no token reached, or a model that
                enters its blocks several times.
        """
        if self._stage is None:
            self._stage = _Stage(self.open_model(), self)
        self._found = self._stage.look(layers)

    def read(self, layer: str, kind: str, device: torch.device | str = "cpu") -> InputStatistics:
        """Of a layer that was met last, on a device; all there is, whatever the kind."""
        return self._found[layer].to(device)

    def settle(self, layer: str, weight: Callable[[], Tensor]) -> None:
        """What a layer computes with from now on, Q + scaling B A in its module's orientation."""
        assert self._stage is not None, f"{layer} is settled before it was met"
        self._stage.settle(layer, weight())

    def close(self) -> None:
        """End all forwards; a second call does nothing."""
        if self._stage is not None:
            self._stage.close()
            self._stage = None


class _Stage:
    """The forwards of both models, all at the entrance of one block."""

    def __init__(self, model: BlockModel, about: SequentialStatistics) -> None:
        if model.reenters:
            raise ValueError(
                f"{type(model.module).__name__}: enters its blocks several times, since layers "
                "share their weights, so that no layer comes after all others were quantized. "
                "Choose a method with a symmetric target (fast)."
            )
        self.model, self.about = model, about
        self._weights: dict[str, Tensor] = {}
        self._cleanup = ExitStack()
        self.at: str | None = None
        pieces = zip(
            about.windows.ids.split(about.chunk), about.windows.mask.split(about.chunk), strict=True
        )
        self.pairs = [(_Actor(model, i, m), _Actor(model, i, m)) for i, m in pieces]
        try:
            self._open()
        except BaseException:  # nobody else knows of the hooks and threads that are there by now
            self.close()
            raise

    def _open(self) -> None:
        """All forwards to the entrance of the first block."""
        actors = [actor for pair in self.pairs for actor in pair]
        self._cleanup.push(standing(self.model, actors))
        self._move()

    def close(self) -> None:
        """End the forwards; the model is as it was, without the weights of its blocks."""
        if self.at is not None:
            self.model.drop(self.at)
            self.at = None
        self._cleanup.close()

    def settle(self, layer: str, weight: Tensor) -> None:
        """Give the second model its weight, in the dtype of the block."""
        like = self.model.module.get_parameter(f"{layer}.weight")
        self._weights[layer] = weight.to(like.device, like.dtype)

    def look(self, layers: Sequence[str]) -> dict[str, InputStatistics]:
        """Go on to the block of these layers and rehearse it."""
        inside = {layer: self.about.layers[layer] for layer in layers}
        block = self._block_of(layers)
        while self.at != block:
            assert self.at is not None, f"{layers[0]} lies behind the forwards"
            self._move()
        self._settle_recalled(block)
        sums = _Sums(self.model, inside)
        for original, quantized in self.pairs:
            with sums.first(original.mask):
                original.rehearse()
            with self._quantized(), sums.second():
                quantized.rehearse()
        return sums.results()

    def _block_of(self, layers: Sequence[str]) -> str:
        for block in self.model.blocks:
            if layers[0].startswith(f"{block}."):
                assert all(layer.startswith(f"{block}.") for layer in layers), layers
                return block
        raise ValueError(
            f"{layers[0]}: lies outside of the blocks, where nothing is taken in sequence. Leave "
            f'it out with skip=["{layers[0]}"].'
        )

    def _move(self) -> None:
        """All forwards through the block where they are, each with its own weights."""
        before = self.at
        if before is not None:
            missing = self._settle_recalled(before)
            assert not missing, f"{missing} are left behind unsolved"
        reached = advance([original for original, _ in self.pairs])
        with self._quantized():
            also = advance([quantized for _, quantized in self.pairs])
        assert also == reached, f"forwards of one model took different ways: {reached}, {also}"
        if before is not None:
            self._weights.clear()
            self.model.drop(before)
            done = list(self.model.blocks).index(before) + 1
            self.about.on_block(before, done, len(self.model.blocks))
        self.at = reached
        if self.at is not None:
            self.model.load(self.at)

    def _settle_recalled(self, block: str) -> list[str]:
        """Settle what an earlier run has quantized of a block; returns its unsolved layers."""
        inside = layers_in(block, self.about.layers, self.model.blocks)
        for layer in inside.keys() - self._weights.keys():
            if (weight := self.about.recall(layer)) is not None:
                self.settle(layer, weight)
        return sorted(inside.keys() - self._weights.keys())

    @contextmanager
    def _quantized(self) -> Iterator[None]:
        """Quantized weights in place of the original ones, for one forward."""
        with ExitStack() as back:
            for layer, weight in self._weights.items():
                parameter = self.model.module.get_parameter(f"{layer}.weight")
                back.callback(setattr, parameter, "data", parameter.data)
                parameter.data = weight
            yield


class _Sums:
    """Inputs of some layers in two forwards of one chunk, added up pair by pair."""

    def __init__(self, model: BlockModel, layers: Mapping[str, int]) -> None:
        self.model, self.layers = model, layers
        self.leaders: dict[str, str] = {}
        self.sums: dict[str, PairAccumulator] = {}
        self.mask = torch.empty(0)
        self._inputs: dict[str, Tensor] = {}
        self._originals: dict[str, Tensor] = {}

    @contextmanager
    def first(self, mask: Tensor) -> Iterator[None]:
        """Keep the inputs that the original model meets."""
        self.mask = mask.to(self.model.device)
        with self._looking():
            yield
        self._originals = self._inputs

    @contextmanager
    def second(self) -> Iterator[None]:
        """Add what the quantized model meets, paired with them."""
        with self._looking():
            yield
        for layer, x_hat in self._inputs.items():
            if self.leaders.setdefault(layer, self._leader(layer)) == layer:
                self._add(layer, self._originals[layer], x_hat)
        self._inputs, self._originals = {}, {}

    def results(self) -> dict[str, InputStatistics]:
        """By layer."""
        found = means_of(self.sums, self.layers, self.leaders)
        return {layer: found[self.leaders[layer]] for layer in self.layers}

    @contextmanager
    def _looking(self) -> Iterator[None]:
        self._inputs = {}
        with ExitStack() as stack:
            for layer in self.layers:
                hook = self.model.module.get_submodule(layer).register_forward_pre_hook(
                    lambda module, args, kwargs, layer=layer: self._look(layer, args, kwargs),
                    with_kwargs=True,
                )
                stack.callback(hook.remove)
            yield

    def _look(self, layer: str, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        x = args[0] if args else next(iter(kwargs.values()))
        # Tokens come first; a table of relative positions may go the same way afterwards.
        if layer in self._inputs or not of_tokens(x, self.mask):
            return
        self._inputs[layer] = x
        if len(self._inputs) == len(self.layers):
            raise _Enough

    def _leader(self, layer: str) -> str:
        """The first layer that reads the very same tensor."""
        x = self._inputs[layer]
        return next(other for other in self.layers if self._inputs.get(other) is x)

    def _add(self, layer: str, x: Tensor, x_hat: Tensor) -> None:
        if layer not in self.sums:
            self.sums[layer] = PairAccumulator(self.layers[layer], x.device)
        shape = (*self.mask.shape, -1)
        self.sums[layer].add(x.reshape(shape), x_hat.reshape(shape), self.mask)


class _Actor(Run):
    """A forward that can also rehearse the block at whose entrance it waits."""

    _acting = False

    def rehearse(self) -> None:
        """Run the block without going on."""
        self._go.put(REHEARSE)
        reached = self._reached.get()
        if isinstance(reached, BaseException):
            raise reached

    def at_gate(
        self, block: str, module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]
    ) -> None:
        """Wait, and rehearse as often as that is asked for."""
        if self._acting:
            return
        while self.wait(block) == REHEARSE:
            self._acting = True
            try:
                call_again(module, args, kwargs)
            except _Enough:
                pass
            finally:
                self._acting = False


REHEARSE = "rehearse"


class _Enough(Exception):
    """Ends a rehearsal."""
