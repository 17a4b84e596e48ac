"""Reading a checkpoint: headers at once, tensors one by one out of the page cache.

Each large tensor is its own memory map, released with the tensor: host memory and address space
follow what the caller holds, never the size of the model.
"""

from __future__ import annotations

import errno
import hashlib
import json
import mmap
import os
from collections.abc import Iterable, Mapping
from pathlib import Path

import torch
from torch import Tensor

from loftq.checkpoint.header import DTYPES, CheckpointError, Header, TensorEntry, read_header
from loftq.checkpoint.index import INDEX_SUFFIX, contained, find_weights, read_weight_map

MAP_FROM_BYTES = 65536  # smaller tensors are copied: cheaper than a map and its file descriptor
SAMPLED_TENSORS, SAMPLED_BYTES = 64, 64  # per file, for the fingerprint


def open_checkpoint(folder: Path | str, *, weights: str | None = None) -> Checkpoint:
    """Open the safetensors checkpoint in `folder`, reading and checking its headers only.

    Args:
        folder: a local folder; a snapshot in a hub cache (links into its `blobs`) is fine.
        weights: name of the safetensors file or `*.index.json` in it; by default
            model.safetensors, else model.safetensors.index.json.

    Raises:
        CheckpointError: no such weights, pickle or GGUF only, or any malformed file or index.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise CheckpointError(f"{folder}: not a folder. Give the folder that holds the weights.")
    weights = find_weights(folder) if weights is None else weights
    weight_map: Mapping[str, str] = {}
    files = [weights]
    if weights.endswith(INDEX_SUFFIX):
        weight_map = read_weight_map(folder, weights)
        files = sorted(set(weight_map.values()))
    headers = [read_header(contained(folder, file)) for file in files]
    return Checkpoint(folder, headers, _merge(folder, headers, weight_map))


class Checkpoint:
    """An open checkpoint: `tensors` says what there is, `read` and `read_bytes` give the data."""

    def __init__(
        self, folder: Path, headers: Iterable[Header], tensors: Mapping[str, TensorEntry]
    ) -> None:
        self.folder = folder
        self.tensors = dict(tensors)
        self._headers = {header.path.name: header for header in headers}

    @property
    def files(self) -> dict[str, int]:
        """File name -> bytes of the file."""
        return {name: header.size for name, header in self._headers.items()}

    def read(self, name: str) -> Tensor:
        """The tensor, on the CPU; from 64 KiB on it is a private map of the file (no copy).

        In-place writes to it stay in memory and never reach the file. On Linux each mapped tensor
        holds a file descriptor while it lives.
        """
        entry = self._find(name)
        dtype = DTYPES[entry.dtype]
        if entry.nbytes == 0:
            return torch.empty(entry.shape, dtype=dtype)
        if entry.offset_begin % dtype.itemsize:  # a map would hand out misaligned elements
            data = memoryview(bytearray(self.read_bytes(name)))
        else:
            data = self._bytes(entry, mmap.ACCESS_COPY)
        return torch.frombuffer(data, dtype=dtype).reshape(entry.shape)

    def read_bytes(self, name: str) -> memoryview:
        """The tensor's bytes as they lie in the file, read-only and without a copy if large."""
        return self._bytes(self._find(name), mmap.ACCESS_READ).toreadonly()

    def sha256(self, name: str) -> str:
        """Hash of the tensor's bytes, hexadecimal."""
        return hashlib.sha256(self.read_bytes(name)).hexdigest()

    def fingerprint(self) -> str:
        """A cheap identity of the checkpoint: names, dtypes, shapes, sizes and some of the data.

        Headers alone cannot tell two fine-tunes of one model apart, so 64 bytes from the middle of
        at most 64 tensors per file are hashed too. It guards a resume; `sha256` proves content.
        """
        digest = hashlib.sha256()
        for file, header in sorted(self._headers.items()):
            digest.update(json.dumps([file, header.size, header.sha256]).encode())
            step = -(-len(header.tensors) // SAMPLED_TENSORS) or 1
            with header.path.open("rb") as opened:
                for entry in header.tensors[::step]:
                    opened.seek((entry.offset_begin + entry.offset_end) // 2)
                    digest.update(opened.read(min(SAMPLED_BYTES, entry.nbytes)))
        return digest.hexdigest()

    def _find(self, name: str) -> TensorEntry:
        try:
            return self.tensors[name]
        except KeyError:
            raise CheckpointError(
                f"{self.folder}: no tensor {name!r} among {len(self.tensors)}. "
                "Check the name, or that this is the checkpoint you mean."
            ) from None

    def _bytes(self, entry: TensorEntry, access: int) -> memoryview:
        header = self._headers[entry.file]
        try:
            with header.path.open("rb") as file:
                if os.fstat(file.fileno()).st_size != header.size:
                    raise CheckpointError(
                        f"{header.path}: changed size since it was opened. Do not write to a "
                        "checkpoint while it is read; run the command again."
                    )
                if entry.nbytes < MAP_FROM_BYTES:
                    file.seek(entry.offset_begin)
                    return memoryview(bytearray(file.read(entry.nbytes)))
                return _map(file.fileno(), entry, access)
        except OSError as error:
            if error.errno != errno.EMFILE:
                raise
            raise CheckpointError(
                f"{header.path}: too many open files. Hold fewer tensors at a time (each keeps "
                "one open), or raise the limit with `ulimit -n`."
            ) from error


def _map(descriptor: int, entry: TensorEntry, access: int) -> memoryview:
    start = entry.offset_begin - entry.offset_begin % mmap.ALLOCATIONGRANULARITY
    mapped = mmap.mmap(descriptor, entry.offset_end - start, access=access, offset=start)
    if hasattr(mmap, "MADV_WILLNEED"):
        mapped.madvise(mmap.MADV_WILLNEED)  # whole tensors are read: fetch ahead of the faults
    return memoryview(mapped)[entry.offset_begin - start :]


def _merge(
    folder: Path, headers: Iterable[Header], weight_map: Mapping[str, str]
) -> dict[str, TensorEntry]:
    """All tensors by name; each in one file, and every name of the index in its file."""
    tensors: dict[str, TensorEntry] = {}
    for entry in (entry for header in headers for entry in header.tensors):
        first = tensors.setdefault(entry.name, entry)
        if first is not entry:
            raise CheckpointError(
                f"{folder}: tensor {entry.name!r} is in two files, {first.file} and {entry.file}. "
                "Remove the file that does not belong to this checkpoint, or download it again."
            )
    for name, file in weight_map.items():
        if name not in tensors or tensors[name].file != file:
            raise CheckpointError(
                f"{folder}: the index places tensor {name!r} in {file}, which does not hold it. "
                "Index and files are of different versions: download both again."
            )
    return tensors
