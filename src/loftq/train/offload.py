"""What checkpointing keeps of each block, its input, waits for the backward in host memory.

While the GPU computes the next blocks, a second stream copies the input to pinned host memory; in
the backward it brings the input of the block before back while one block is differentiated. At
2 x 2048 tokens of a 7B model an input is 34 MB, a copy of it under a millisecond, a block several:
neither way is waited for, and 32 inputs take the memory of two.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

NEWEST = 2
"""Inputs that stay on the device: the backward begins with them."""
SMALLEST = 1 << 20
"""Bytes below which a tensor stays where it is."""


class _SideStream:
    """Copies in the order they are asked for, each behind what the device had to do by then."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None

    def copy(self, to: Tensor, of: Tensor) -> torch.cuda.Event | None:
        """Begin a copy; neither tensor may be let go of before `wait` for what this returns."""
        if self._stream is None:
            to.copy_(of)
            return None
        self._stream.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(self._stream):
            to.copy_(of, non_blocking=True)
            return self._stream.record_event()

    def wait(self, copied: torch.cuda.Event | None) -> None:
        """What is computed from now on comes after that copy."""
        if copied is not None:
            torch.cuda.current_stream(self.device).wait_event(copied)

    def wait_for_all(self) -> None:
        """What is computed from now on comes after every copy."""
        if self._stream is not None:
            torch.cuda.current_stream(self.device).wait_stream(self._stream)


@dataclass(eq=False)
class _Kept:
    """One input: on the host from its copy on, on the device while it is wanted there."""

    before: _Kept | None
    """Of the block before, wanted next in the backward."""
    host: Tensor
    device: Tensor | None
    copied: torch.cuda.Event | None
    """The last copy, either way, is done."""


class HostInputs(saved_tensors_hooks):
    """While it is entered, inputs of checkpointed blocks are kept in host memory.

    They are (batch, tokens, hidden), the first of that rank that a forward saves and all of its
    shape, in the order of the blocks. What a block saves inside of a checkpoint never comes here.
    The backward comes after the context.

    Args:
        device: of the model; with "cpu" all is done at once, and nothing is gained.
    """

    def __init__(self, device: torch.device) -> None:
        super().__init__(self._pack, self._unpack)
        self._side = _SideStream(device)
        self.kept: list[_Kept] = []
        self._most = 0

    def __enter__(self) -> None:
        self._most = max(self._most, self.host_bytes)
        self._side.wait_for_all()  # of a forward whose backward was not run to its end
        self.kept.clear()
        super().__enter__()

    @property
    def told(self) -> dict[str, int]:
        """Most bytes of a forward in host memory, for the summary of a run."""
        return {"host_bytes": max(self._most, self.host_bytes)}

    @property
    def host_bytes(self) -> int:
        """Of the last forward."""
        return sum(one.host.nbytes for one in self.kept)

    @property
    def device_bytes(self) -> int:
        """Of the inputs that are on the device now."""
        return sum(one.device.nbytes for one in self.kept if one.device is not None)

    def _pack(self, tensor: Tensor) -> Any:
        if not self._moves(tensor):
            return tensor
        pinned = tensor.device.type == "cuda"
        host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=pinned)
        copied = self._side.copy(host, tensor)
        before = self.kept[-1] if self.kept else None
        self.kept.append(_Kept(before, host, tensor.detach(), copied))
        if len(self.kept) > NEWEST:
            self._let_go(self.kept[-1 - NEWEST])
        return self.kept[-1]

    def _unpack(self, packed: Any) -> Tensor:
        if isinstance(packed, Tensor):
            return packed
        tensor = self._fetch(packed)
        if packed.before is not None:
            self._fetch(packed.before)
        self._let_go(packed)  # to who asked for it
        return tensor

    def _fetch(self, one: _Kept) -> Tensor:
        """The input on the device, where its copy may still be under way."""
        if one.device is None:
            one.device = torch.empty_like(one.host, device=self._side.device)
            one.copied = self._side.copy(one.device, one.host)
        return one.device

    def _let_go(self, one: _Kept) -> None:
        self._side.wait(one.copied)  # then its memory may be read and written to
        one.device = None

    def _moves(self, tensor: Tensor) -> bool:
        if self.kept and tensor.shape != self.kept[0].host.shape:
            return False  # logits, rotary tables
        here = tensor.device.type == self._side.device.type
        plain = tensor.is_floating_point() and tensor.is_contiguous() and tensor.dim() == 3
        return here and plain and tensor.nbytes >= SMALLEST


def why_not_offloaded(device: torch.device, *, checkpointing: bool, graphs: bool) -> str:
    """Why inputs of blocks cannot be kept in host memory here, or ""."""
    if device.type != "cuda":
        return "the host is where this device keeps everything"
    if not checkpointing:
        return "without checkpointing blocks keep more than their inputs"
    if graphs:
        return "a graph copies nothing to the host; graphs=false"
    return ""
