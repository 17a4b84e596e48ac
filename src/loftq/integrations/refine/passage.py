"""All windows of a model's forward, waiting side by side at the entrance of one block.

There the block can be called with what each of them has brought along, as often as is wanted and
with gradients, before they go on.
"""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from loftq.calibration import Run, advance, call_again, standing
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
        self._cleanup = standing(self.model, self._runs)
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
        reached = advance(self._runs)
        if self.at is not None:
            self.model.drop(self.at)
        self.at = reached
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


class _Waiting(Run):
    """A forward that keeps what it brings to the block where it waits, and what it ends with."""

    inputs: tuple[tuple[Any, ...], Mapping[str, Any]]
    result: Tensor

    def at_gate(
        self, block: str, module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]
    ) -> None:
        """Keep what the block is given, and wait."""
        self.inputs = (args, kwargs)
        self.wait(block)

    @staticmethod
    def end(module: nn.Module, args: object, output: Any) -> None:
        """Called with what the base model returns."""
        run = threading.current_thread()
        if isinstance(run, _Waiting):
            run.result = first(output)


def first(output: Any) -> Tensor:
    """The hidden states among what a module returns."""
    return output if isinstance(output, Tensor) else output[0]
