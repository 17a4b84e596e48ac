"""Statistics on disk, one file per block: taken once, used by every method and bit-width.

A folder is named by the fingerprint of what decides its numbers: the source's weights, the tokens
and the kind of device. Of a symmetric Gram the lower triangle is kept.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save
from torch import Tensor

from loftq.calibration.accumulators import KINDS, InputStatistics
from loftq.checkpoint.durable import publish, write_partial

STORE_VERSION = 1
CACHE = "LOFTQ_CACHE"
_OUTSIDE_FILE = "outside"


def default_folder() -> Path:
    """Where statistics go unless told otherwise: LOFTQ_CACHE, else the user's cache folder."""
    home = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(os.environ.get(CACHE) or Path(home) / "loftq") / "statistics"


def statistics_fingerprint(*, source: str, tokens: str, device: str) -> str:
    """Name of the statistics of these weights on these tokens, computed on this kind of device."""
    parts = [STORE_VERSION, source, tokens, device.split(":")[0]]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:32]


class StatisticsStore:
    """The statistics of one model on one set of tokens.

    Args:
        folder: holds a folder per fingerprint; made when something is written.
        fingerprint: from `statistics_fingerprint`.
    """

    def __init__(self, folder: Path, fingerprint: str) -> None:
        self.folder, self.fingerprint = folder / fingerprint, fingerprint

    def has(self, block: str, layers: Iterable[str], kind: str) -> bool:
        """Whether a block's statistics of at least this kind are there for all these layers."""
        path = self._path(block)
        if not path.is_file():
            return False
        about = _about(path)
        return KINDS.index(about["kind"]) >= KINDS.index(kind) and about["leaders"].keys() >= set(
            layers
        )

    def holds(self, layers: Iterable[str], kind: str) -> bool:
        """Whether statistics of at least this kind are there for all these layers."""
        return all(self.has(self._block_of(layer), [layer], kind) for layer in layers)

    def write(
        self, block: str, statistics: Mapping[str, InputStatistics], leaders: Mapping[str, str]
    ) -> None:
        """Keep the statistics of a block, durably: its file is there whole or not at all."""
        self.packed(block, statistics, leaders)()

    def packed(
        self, block: str, statistics: Mapping[str, InputStatistics], leaders: Mapping[str, str]
    ) -> Callable[[], None]:
        """`write` in two steps: all is brought to the CPU here, the call that is returned keeps it.

        The second step may run in another thread, while a GPU takes the statistics of the next
        block.
        """
        tensors: dict[str, Tensor] = {}
        for leader, found in statistics.items():
            tensors[f"{leader}.mean_square"] = found.mean_square.cpu().contiguous()
            tensors[f"{leader}.largest_mean"] = found.largest_mean.cpu().contiguous()
            if found.gram is not None:
                lower = _lower(len(found.gram), found.gram.device)
                tensors[f"{leader}.gram"] = found.gram.masked_select(lower).cpu()
        grams = all(found.gram is not None for found in statistics.values())
        about = {
            "version": STORE_VERSION,
            "kind": "gram" if grams else "diagonal",
            "leaders": dict(leaders),
            "tokens": {leader: [s.tokens, s.dropped] for leader, s in statistics.items()},
        }
        path = self._path(block)

        def keep() -> None:
            write_partial(path, save(tensors, {"loftq": json.dumps(about)}))
            publish(path)

        return keep

    def read(self, layer: str, kind: str, device: torch.device | str = "cpu") -> InputStatistics:
        """Statistics of the inputs of a layer; `kind` diagonal leaves the Gram on the disk.

        Raises:
            ValueError: they are not there.
        """
        block = self._block_of(layer)
        if not self.has(block, [layer], kind):
            raise ValueError(
                f"{layer}: no {kind} statistics in {self.folder}. No calibration token reached the "
                f'layer: leave it out with skip=["{layer}"], or calibrate on inputs that use it.'
            )
        path = self._path(block)
        about = _about(path)
        leader = about["leaders"][layer]
        tokens, dropped = about["tokens"][leader]
        with safe_open(path, "pt") as file:
            mean_square = file.get_tensor(f"{leader}.mean_square")
            largest_mean = file.get_tensor(f"{leader}.largest_mean")
            packed = file.get_tensor(f"{leader}.gram") if kind == "gram" else None
        return InputStatistics(
            mean_square=mean_square.to(device),
            largest_mean=largest_mean.to(device),
            gram=None if packed is None else _unpacked(packed.to(device), len(mean_square)),
            tokens=tokens,
            dropped=dropped,
        )

    def meet(self, layers: Sequence[str]) -> None:
        """Nothing: what a full-precision model reads does not depend on what was solved."""

    def settle(self, layer: str, weight: Callable[[], Tensor]) -> None:
        """Nothing, as `meet`."""

    def close(self) -> None:
        """Nothing is open."""

    def _block_of(self, layer: str) -> str:
        """The block around a layer: the innermost path that has a file."""
        path = layer
        while path and not self._path(path).is_file():
            path = path.rpartition(".")[0]
        return path

    def _path(self, block: str) -> Path:
        return self.folder / f"{block or _OUTSIDE_FILE}.safetensors"


def _about(path: Path) -> dict[str, Any]:
    with safe_open(path, "pt") as file:
        return json.loads(file.metadata()["loftq"])


def _lower(size: int, device: torch.device) -> Tensor:
    return torch.ones(size, size, dtype=torch.bool, device=device).tril_()


def _unpacked(packed: Tensor, size: int) -> Tensor:
    """The symmetric matrix of a lower triangle."""
    gram = torch.zeros(size, size, dtype=packed.dtype, device=packed.device)
    gram.masked_scatter_(_lower(size, packed.device), packed)
    gram += gram.tril(-1).mT
    return gram
