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


@dataclass(eq=False)
class _Kept:
    """One input: on the host from its copy on, on the device while it is wanted there."""

    number: int
    host: Tensor
    device: Tensor | None
    moved: torch.cuda.Event
    """The last copy, either way, is done."""


class HostInputs(saved_tensors_hooks):
    """While it is entered, inputs of checkpointed blocks are kept in host memory.

    Each forward begins anew: its tensors are (batch, tokens, hidden) and saved in the order of the
    blocks. What a block saves inside of a checkpoint never comes here.

    Args:
        device: a CUDA device.
    """

    def __init__(self, device: torch.device) -> None:
        super().__init__(self._pack, self._unpack)
        self.stream = torch.cuda.Stream(device)
        self.kept: list[_Kept] = []

    def __enter__(self) -> None:
        # Copies of a forward whose backward was not run to its end.
        torch.cuda.current_stream(self.stream.device).wait_stream(self.stream)
        self.kept.clear()
        super().__enter__()

    @property
    def host_bytes(self) -> int:
        """Of the last forward."""
        return sum(one.host.nbytes for one in self.kept)

    def _pack(self, tensor: Tensor) -> Any:
        if not _moves(tensor):
            return tensor
        current = torch.cuda.current_stream(tensor.device)
        host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
        moved = self._copy(host, tensor, current)
        self.kept.append(_Kept(len(self.kept), host, tensor.detach(), moved))
        if len(self.kept) > NEWEST:
            old = self.kept[-1 - NEWEST]
            current.wait_event(old.moved)  # then its memory may be written to
            old.device = None
        return self.kept[-1]

    def _unpack(self, packed: Any) -> Tensor:
        if isinstance(packed, Tensor):
            return packed
        current = torch.cuda.current_stream(self.stream.device)
        tensor = self._fetch(packed, current)
        if packed.number:
            self._fetch(self.kept[packed.number - 1], current)
        current.wait_event(packed.moved)
        packed.device = None
        return tensor

    def _fetch(self, one: _Kept, current: torch.cuda.Stream) -> Tensor:
        if one.device is None:
            one.device = torch.empty_like(one.host, device=self.stream.device)
            one.moved = self._copy(one.device, one.host, current)
        return one.device

    def _copy(self, to: Tensor, of: Tensor, current: torch.cuda.Stream) -> torch.cuda.Event:
        """Behind what `current` has to do so far."""
        self.stream.wait_stream(current)
        with torch.cuda.stream(self.stream):
            to.copy_(of, non_blocking=True)
            return self.stream.record_event()


def why_not_offloaded(device: torch.device, *, kind: str, checkpointing: bool, graphs: bool) -> str:
    """Why inputs of blocks cannot be kept in host memory here, or ""."""
    if device.type != "cuda":
        return "the host is where this device keeps everything"
    if not checkpointing:
        return "without checkpointing blocks keep more than their inputs"
    if graphs:
        return "a graph copies nothing to the host"
    if kind != "sft":
        return "only supervised training does"
    return ""


def _moves(tensor: Tensor) -> bool:
    plain = tensor.is_cuda and tensor.is_floating_point() and tensor.is_contiguous()
    return plain and tensor.dim() == 3 and tensor.nbytes >= SMALLEST
