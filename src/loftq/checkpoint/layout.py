"""Where every byte of the output goes, known before any work is done.

Shapes and dtypes follow from the plan, so files can be laid out up front and filled in any order.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Any

from loftq.checkpoint.header import DTYPES, MAX_HEADER_BYTES, TensorEntry
from loftq.checkpoint.index import INDEX_SUFFIX

MAX_SHARD_BYTES = 5_000_000_000


@dataclass(frozen=True)
class TensorSpec:
    """A tensor to be written: its name, safetensors dtype ("BF16", "U8", ...) and shape."""

    name: str
    dtype: str
    shape: tuple[int, ...]

    def __post_init__(self) -> None:
        if self.dtype not in DTYPES:
            raise ValueError(
                f"{self.name}: dtype {self.dtype!r} is unknown; use one of {', '.join(DTYPES)}."
            )

    @property
    def nbytes(self) -> int:
        """Bytes of the tensor's data."""
        return math.prod(self.shape) * DTYPES[self.dtype].itemsize


@dataclass(frozen=True)
class ShardFile:
    """One safetensors file to be: its header, and the place of each tensor."""

    filename: str
    """Path inside the output folder, with forward slashes."""
    header_bytes: bytes
    """Header length and header, padded to 8 bytes: the file's first bytes."""
    tensors: dict[str, TensorEntry]
    """Name -> entry with absolute offsets, in file order."""
    index: str | None = None
    """Name of the index file that lists this file; None for a file that stands alone."""

    @classmethod
    def plan(
        cls, filename: str, tensors: Sequence[TensorSpec], *, index: str | None = None
    ) -> ShardFile:
        """Lay out `tensors` in one file: wide dtypes first (so all are aligned), else as given.

        Raises:
            ValueError: a name twice, a path that leaves the output folder, a header over 100 MB.
        """
        path = PurePosixPath(filename)
        if path.is_absolute() or ".." in path.parts or not path.name:
            raise ValueError(f"{filename!r}: expected a path inside the output folder.")
        ordered = sorted(tensors, key=lambda spec: -DTYPES[spec.dtype].itemsize)
        header = _encode_header(ordered)
        if len(header) > MAX_HEADER_BYTES:
            raise ValueError(
                f"{filename}: a header of {len(header)} bytes exceeds the format's "
                f"{MAX_HEADER_BYTES}; lower max_shard_bytes so that fewer tensors share a file."
            )
        entries, position = {}, len(header)
        for spec in ordered:
            end = position + spec.nbytes
            entries[spec.name] = TensorEntry(
                spec.name, filename, spec.dtype, spec.shape, position, end
            )
            position = end
        if len(entries) != len(tensors):
            raise ValueError(f"{filename}: a tensor name occurs twice.")
        return cls(filename, header, entries, index)

    @property
    def nbytes(self) -> int:
        """Size of the whole file."""
        return len(self.header_bytes) + sum(entry.nbytes for entry in self.tensors.values())


def plan_shards(
    tensors: Sequence[TensorSpec], *, prefix: str, max_shard_bytes: int = MAX_SHARD_BYTES
) -> list[ShardFile]:
    """Split `tensors`, in the order given, over PREFIX-00001-of-0000N.safetensors files.

    The same arguments give the same bytes. A tensor above `max_shard_bytes` gets its own file. All
    files are listed by PREFIX.safetensors.index.json, which the writer adds.

    Raises:
        ValueError: no tensors, or a name that occurs twice.
    """
    if len({spec.name for spec in tensors}) != len(tensors) or not tensors:
        raise ValueError(f"{prefix}: expected tensors with distinct names, got {len(tensors)}.")
    groups: list[list[TensorSpec]] = []
    room = -1
    for spec in tensors:
        if spec.nbytes > room:
            groups.append([])
            room = max(max_shard_bytes, spec.nbytes)
        groups[-1].append(spec)
        room -= spec.nbytes
    index = f"{prefix}.safetensors{INDEX_SUFFIX}"
    return [
        ShardFile.plan(f"{prefix}-{k:05d}-of-{len(groups):05d}.safetensors", group, index=index)
        for k, group in enumerate(groups, 1)
    ]


def index_files(shards: Iterable[ShardFile]) -> dict[str, bytes]:
    """Name -> content of each index that the shards name."""
    contents: dict[str, dict[str, Any]] = {}
    for shard in shards:
        if shard.index is not None:
            empty = {"metadata": {"total_size": 0}, "weight_map": {}}
            content = contents.setdefault(shard.index, empty)
            content["weight_map"] |= dict.fromkeys(shard.tensors, shard.filename)
            content["metadata"]["total_size"] += shard.nbytes - len(shard.header_bytes)
    return {
        name: (json.dumps(content, indent=2, sort_keys=True) + "\n").encode()
        for name, content in contents.items()
    }


def _encode_header(specs: Iterable[TensorSpec]) -> bytes:
    fields: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    position = 0
    for spec in specs:
        end = position + spec.nbytes
        offsets = [position, end]
        fields[spec.name] = {"dtype": spec.dtype, "shape": spec.shape, "data_offsets": offsets}
        position = end
    text = json.dumps(fields, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text
