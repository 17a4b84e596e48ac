"""All windows of a model's forward, waiting side by side at the entrance of one block.

There the block can be called with what each of them has brought along, as often as is wanted and
with gradients, before they go on.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from typing import Any

from torch import Tensor, nn

from loftq.calibration import Run, call_again
from loftq.integrations.blocks import LoadedBlocks

Piece = tuple[Tensor, Tensor]
"""Token ids and mask of some windows, (windows, context) each."""


class Passage:
    """Forwards of `model` over `pieces`, moved from block to block; a context manager.

    Args:
        model: its blocks are loaded where the forwards are.
        pieces: windows of one forward each.
    """

    def __init__(self, model: LoadedBlocks, pieces: Sequence[Piece]) -> None:
        self.model, self.pieces = model, pieces
        self._runs = [_Waiting(model, ids, mask) for ids, mask in pieces]
        self.at: str | None = None
        """The block at whose entrance the forwards are; None when they have ended."""

    def __enter__(self) -> Passage:
        self._cleanup = ExitStack()
        self._cleanup.callback(self.model.module.train, self.model.module.training)
        self.model.module.eval()
        for run in self._runs:
            self._cleanup.callback(run.abandon)
        for block in self.model.blocks:
            self._hook(block, lambda *given, block=block: _Waiting.enter(block, *given[1:]))
        base = self.model.module.get_submodule(self.model.anatomy.base)
        self._cleanup.callback(base.register_forward_hook(_Waiting.end).remove)
        self.advance()
        return self

    def __exit__(self, *_: object) -> None:
        if self.at is not None:
            self.model.drop(self.at)
            self.at = None
        self._cleanup.close()

    def advance(self) -> None:
        """All forwards through the block, to the entrance of the next one or the end."""
        reached = {run.go_on() for run in self._runs}
        assert len(reached) == 1, f"forwards of one model took different ways: {reached}"
        if self.at is not None:
            self.model.drop(self.at)
        self.at = reached.pop()
        if self.at is not None:
            self.model.load(self.at)

    def finish(self) -> None:
        """All forwards to their end."""
        while self.at is not None:
            self.advance()

    def block(self, number: int) -> Tensor:
        """The block's output for a piece: hidden states (windows, context, width)."""
        assert self.at is not None
        args, kwargs = self._runs[number].inputs
        module = self.model.module.get_submodule(self.at)
        return first(call_again(module, args, kwargs))

    def last_hidden(self, number: int) -> Tensor:
        """What the base model gave for a piece, once the forwards have ended."""
        return self._runs[number].result

    def _hook(self, path: str, hook: Callable[..., None]) -> None:
        module = self.model.module.get_submodule(path)
        handle = module.register_forward_pre_hook(hook, with_kwargs=True)
        self._cleanup.callback(handle.remove)


class _Waiting(Run):
    """A forward that keeps what it brings to the block where it waits, and what it ends with."""

    inputs: tuple[tuple[Any, ...], Mapping[str, Any]]
    result: Tensor

    @staticmethod
    def enter(block: str, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        """Called at the entrance of a block."""
        run = threading.current_thread()
        if isinstance(run, _Waiting):  # else the block is called by itself
            run.inputs = (args, kwargs)
            run.wait(block)

    @staticmethod
    def end(module: nn.Module, args: object, output: Any) -> None:
        """Called with what the base model returns."""
        run = threading.current_thread()
        if isinstance(run, _Waiting):
            run.result = first(output)


def first(output: Any) -> Tensor:
    """The hidden states among what a module returns."""
    return output if isinstance(output, Tensor) else output[0]
