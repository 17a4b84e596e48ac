"""Counting the bytes of tensors that are alive while code runs, with real or fake tensors.

Under a fake mode nothing is computed and nothing allocated, so a training step of any model can be
walked through in moments: what autograd saves, when it lets go, what a backward makes on the way.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

Scratch = Callable[[tuple[Any, ...], Any], int]
"""(arguments, result) of an operator -> bytes that it takes besides its result and frees."""


class LiveBytes(TorchDispatchMode):
    """Bytes of the storages that operators make while the mode is on; views count once.

    Args:
        scratch: memory that operators take without making a tensor that is seen here, by operator.
    """

    def __init__(self, scratch: Mapping[Any, Scratch] | None = None) -> None:
        super().__init__()
        self.live = 0
        """Bytes alive now."""
        self.peak = 0
        """Most bytes since the last `reset`."""
        self._scratch = dict(scratch or {})
        self._known: dict[int, weakref.ref[Any]] = {}

    def reset(self) -> None:
        """Look for a new peak from here on."""
        self.peak = self.live

    def ignore(self, *tensors: Tensor) -> None:
        """Leave tensors out that existed before."""
        for tensor in tensors:
            storage = tensor.untyped_storage()
            self._remember(storage, 0)

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in pytree.tree_leaves(result):
            if isinstance(tensor, Tensor):
                storage = tensor.untyped_storage()
                self._remember(storage, storage.nbytes())
        inside = self._scratch.get(func)
        if inside is not None:
            self.peak = max(self.peak, self.live + inside(args, result))
        return result

    def _remember(self, storage: torch.UntypedStorage, size: int) -> None:
        key = storage._cdata
        known = self._known.get(key)
        if known is not None and known() is not None:
            return

        def gone(_: Any) -> None:
            self.live -= size
            self._known.pop(key, None)

        self._known[key] = weakref.ref(storage, gone)
        self.live += size
        self.peak = max(self.peak, self.live)
