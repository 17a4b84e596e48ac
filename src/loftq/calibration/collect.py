"""Collect statistics block by block: one block of a model is on the device at a time.

A model's own forward is left as it is. It runs once for each chunk of windows, every run in a
thread of its own that waits at the entrance of each block. When all have arrived the block's
weights are loaded, the runs pass through it one after the other while hooks look at the inputs of
its layers, and the weights are dropped again. So the device holds what lies outside of the blocks,
one block, and the hidden states of all tokens; and whatever a model passes from block to block
(masks, position embeddings, an encoder's output) is its own business. Decoders, encoders and
encoder-decoders are the same to us.

Only one run moves at any time, so a result does not depend on the scheduling of threads.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from loftq.calibration.accumulators import Accumulator, InputStatistics, PairAccumulator
from loftq.calibration.data import TokenWindows

OUTSIDE = ""
"""Name of the "block" of the layers that lie in none."""


class BlockModel(Protocol):
    """A model cut into blocks whose weights come and go; integrations makes them."""

    @property
    def module(self) -> nn.Module:
        """The whole model; weights of its blocks are loaded only inside `load` and `drop`."""

    @property
    def blocks(self) -> Sequence[str]:
        """Paths of the blocks, in the order in which a forward enters them."""

    @property
    def reenters(self) -> bool:
        """Whether a forward enters a block several times, as where layers share their weights."""

    @property
    def device(self) -> torch.device:
        """Where it runs."""

    def load(self, block: str) -> None:
        """Give a block its weights."""

    def drop(self, block: str) -> None:
        """Take them away again."""

    def forward(self, ids: Tensor, mask: Tensor) -> object:
        """Run the model on windows (n, context) with their mask."""


OnBlock = Callable[[str, Mapping[str, InputStatistics], Mapping[str, str]], None]
"""Called after each block: its path, statistics by leader, and each layer's leader."""


def collect(
    model: BlockModel,
    layers: Mapping[str, int],
    windows: TokenWindows,
    kind: str,
    *,
    on_block: OnBlock,
    skip: Callable[[str], bool] = lambda block: False,
    chunk: int = 4,
) -> None:
    """Run `windows` through the model and hand out the input statistics of every block.

    Args:
        model: see BlockModel.
        layers: module path -> in_features of the layers to look at.
        windows: the tokens.
        kind: "diagonal" or "gram".
        on_block: takes the statistics of a block when all windows have passed it. Layers that read
            the same tensor share those of the first, their leader.
        skip: blocks whose statistics are known already; they are run, but not looked at.
        chunk: windows in one forward.

    Raises:
        ValueError: a layer that no token reached, or none with finite inputs; it is named.
    """
    pieces = zip(windows.ids.split(chunk), windows.mask.split(chunk), strict=True)
    runs = [Run(model, ids, mask) for ids, mask in pieces]
    with standing(model, runs):
        _move(model, layers, runs, kind, on_block, skip)


def standing(model: BlockModel, runs: Sequence[Run]) -> ExitStack:
    """Gates at the blocks of a model in eval mode, for its runs; all of it ends with the stack."""
    module = model.module
    with ExitStack() as cleanup:
        # Once for all runs: the first that ends must not turn dropout on for the others.
        cleanup.callback(module.train, module.training)
        module.eval()
        for run in runs:
            cleanup.callback(run.abandon)
        for block in model.blocks:
            gate = module.get_submodule(block).register_forward_pre_hook(
                lambda *given, block=block: Run.arrive(block, *given), with_kwargs=True
            )
            cleanup.callback(gate.remove)
        return cleanup.pop_all()


def _move(
    model: BlockModel,
    layers: Mapping[str, int],
    runs: Sequence[Run],
    kind: str,
    on_block: OnBlock,
    skip: Callable[[str], bool],
) -> None:
    """Start all runs, then move them from block to block until they end, or all is known."""

    def unknown(block: str) -> dict[str, int]:
        return {} if skip(block) else layers_in(block, layers, model.blocks)

    outside = _Watch(model, unknown(OUTSIDE), kind)
    watches: dict[str, _Watch] = {}
    ahead = set() if outside.layers else {b for b in model.blocks if unknown(b)}
    at = advance(runs, outside)
    while at is not None and (ahead or outside.layers or at in watches):
        if at not in watches:  # a model with shared weights enters one block several times
            watches[at] = _Watch(model, unknown(at), kind)
        watch = watches[at]
        model.load(at)
        following = advance(runs, watch, outside)
        model.drop(at)
        if watch.layers and not model.reenters:
            on_block(at, *watch.results())
            watches[at] = _Watch(model, {}, kind)  # its sums are not needed any more
        ahead.discard(at)
        at = following
    if model.reenters:  # only now is a block complete
        for path, watch in watches.items():
            if watch.layers:
                on_block(path, *watch.results())
    if outside.layers:
        on_block(OUTSIDE, *outside.results())


def advance(runs: Sequence[Run], *watches: _Watch) -> str | None:
    """Let every run go on to the entrance of its next block; None when they ended."""
    reached = set()
    for run in runs:
        with ExitStack() as looking:
            for watch in watches:
                looking.enter_context(watch.over(run.mask))
            reached.add(run.go_on())
    assert len(reached) == 1, f"forwards of one model took different ways: {reached}"
    return reached.pop()


class Run(threading.Thread):
    """One forward that stops at the entrance of each block until `go_on` lets it."""

    def __init__(self, model: BlockModel, ids: Tensor, mask: Tensor) -> None:
        super().__init__(name="calibrate", daemon=True)
        self.model, self.ids, self.mask = model, ids, mask
        # A new thread starts on the default stream of the first GPU: it goes on where this one is.
        cuda = model.device.type == "cuda"
        self._stream = torch.cuda.current_stream(model.device) if cuda else None
        self._go: queue.SimpleQueue[object] = queue.SimpleQueue()
        self._reached: queue.SimpleQueue[str | BaseException | None] = queue.SimpleQueue()

    def go_on(self) -> str | None:
        """Move until the next block, whose path is returned, or the end (None)."""
        if self.ident is None:
            self.start()
        else:
            self._go.put(True)
        reached = self._reached.get()
        if isinstance(reached, BaseException):
            raise reached
        return reached

    def abandon(self) -> None:
        """End a run that waits."""
        if self.ident is not None:
            self._go.put(False)
            self.join()

    @staticmethod
    def arrive(
        block: str, module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]
    ) -> None:
        """Called at the entrance of a block, with what it is given."""
        run = threading.current_thread()
        if isinstance(run, Run):  # else somebody else uses the model
            run.at_gate(block, module, args, kwargs)

    def at_gate(
        self, block: str, module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]
    ) -> None:
        """What this run does at the entrance of a block."""
        self.wait(block)

    def wait(self, block: str) -> object:
        """Say that this run has come to a block; what it is told, once it may go on."""
        self._reached.put(block)
        told = self._go.get()
        if not told:
            raise _Abandoned
        return told

    def run(self) -> None:
        """The forward."""
        try:
            with torch.no_grad(), torch.cuda.stream(self._stream):
                self.model.forward(self.ids, self.mask)
            self._reached.put(None)
        except _Abandoned:
            pass
        except BaseException as error:  # whatever it is, whoever waits for this run must hear it
            self._reached.put(error)


class _Abandoned(Exception):
    """Ends a waiting run."""


@dataclass
class _Seen:
    """An input that a layer of this block has read in this chunk."""

    x: Tensor
    leader: str


class _Watch:
    """Hooks on some layers that add their inputs to accumulators."""

    def __init__(self, model: BlockModel, layers: Mapping[str, int], kind: str) -> None:
        self.model, self.layers, self.kind = model, layers, kind
        self.leaders: dict[str, str] = {}
        self.sums: dict[str, Accumulator] = {}
        self.mask = torch.empty(0)  # of the chunk that is run
        self._seen: list[_Seen] = []
        self._counted: set[str] = set()

    def over(self, mask: Tensor) -> ExitStack:
        """Hooks for one chunk of windows, removed when the stack is left."""
        self.mask, self._seen = mask.to(self.model.device), []
        self._counted.clear()
        stack = ExitStack()
        for path in self.layers:
            hook = self.model.module.get_submodule(path).register_forward_pre_hook(
                lambda module, args, kwargs, path=path: self._look(path, args, kwargs),
                with_kwargs=True,
            )
            stack.callback(hook.remove)
        stack.callback(self._seen.clear)
        return stack

    def results(self) -> tuple[dict[str, InputStatistics], dict[str, str]]:
        """Statistics by leader, and the leader of each layer."""
        return means_of(self.sums, self.layers, self.leaders), dict(self.leaders)

    def _look(self, path: str, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        """Count what a layer reads, once in each passage: the tokens come first.

        DeBERTa sends a table of relative positions through the same projections afterwards. It has
        a batch of its own, and may have as many rows as there are tokens.
        """
        x = args[0] if args else next(iter(kwargs.values()))
        if path in self._counted or not of_tokens(x, self.mask):
            return
        self._counted.add(path)
        known = next((seen for seen in self._seen if seen.x is x), None)
        first = path not in self.leaders
        if known is None:
            self._seen.append(_Seen(x, path))
        if first:
            self.leaders[path] = path if known is None else known.leader
        leader = self.leaders[path]
        if leader != path:
            same = known is not None and known.leader == leader
            assert same, f"{path} no longer reads what {leader} reads"
            return
        if first:
            self.sums[path] = Accumulator(self.layers[path], self.kind, x.device)
        self.sums[path].add(x.reshape(*self.mask.shape, -1), self.mask)


def means_of(
    sums: Mapping[str, Accumulator | PairAccumulator],
    layers: Iterable[str],
    leaders: Mapping[str, str],
) -> dict[str, InputStatistics]:
    """Statistics by leader, each of `layers` having one.

    Raises:
        ValueError: a layer that no token reached, or a sum that gives no mean; it is named.
    """
    found = {}
    for leader, total in sums.items():
        try:
            found[leader] = total.result()
        except ValueError as error:
            raise ValueError(f"{leader}: {error}") from error
    for layer in layers:
        if layer not in leaders:
            raise ValueError(
                f"{layer}: no calibration token reached it, so that nothing is known of its "
                f'inputs. Leave it out with skip=["{layer}"], or use more text.'
            )
    return found


def call_again(module: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    """Call a block on copies of inputs that are needed again, since it may write into them."""
    return module(*map(_copied, args), **{key: _copied(value) for key, value in kwargs.items()})


def _copied(value: Any) -> Any:
    return value.clone() if isinstance(value, Tensor) else value


def of_tokens(x: Tensor, mask: Tensor) -> bool:
    """Whether x holds one row for each token of a chunk, by windows or in one list."""
    return x.shape[:-1] in (mask.shape, (mask.numel(),))


def layers_in(block: str, layers: Mapping[str, int], blocks: Sequence[str]) -> dict[str, int]:
    """The layers (path -> in_features) inside of a block; of OUTSIDE, those in none of `blocks`."""
    if block != OUTSIDE:
        return {path: n for path, n in layers.items() if path.startswith(f"{block}.")}
    inside = tuple(f"{other}." for other in blocks)
    return {path: n for path, n in layers.items() if not path.startswith(inside)}
