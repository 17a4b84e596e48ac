"""Writing a checkpoint: files laid out up front, filled in any order, resumable at any moment.

Until `finish`, files bear `.partial` names. A batch counts once its tensors are durable and its
line is in the journal; after a kill the same calls skip what counts and end in the same bytes.
"""

from __future__ import annotations

import contextlib
import ctypes
import hashlib
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from loftq.checkpoint.durable import (
    ProcessLock,
    check_space,
    explained,
    partial,
    publish,
    pwrite_all,
    reserve,
    sync_folder,
    write_partial,
)
from loftq.checkpoint.header import DTYPES, CheckpointError, TensorEntry
from loftq.checkpoint.journal import Journal
from loftq.checkpoint.layout import ShardFile, index_files


class CheckpointWriter:
    """Writes the tensors of `shards` into `folder`; resumes what `journal_path` says was begun.

    `write` and `write_bytes` may be called from several threads; the rest from one. Leaving the
    context (or `close`) keeps partial files and journal, so that the same calls resume.

    Args:
        folder: output folder, made if missing.
        shards: every file to be written, from `plan_shards` and `ShardFile.plan`.
        journal_path: file that records finished batches; its lock file lies beside it.
        fingerprint: identity of input and settings; a resume with another is refused.
        describe: the settings behind the fingerprint, so that a refusal can say what differs.

    Raises:
        CheckpointError: another process writes here, the disk is too small (needed and free bytes
            are named), or the journal belongs to another run.
    """

    def __init__(
        self,
        folder: Path | str,
        shards: Sequence[ShardFile],
        journal_path: Path | str,
        fingerprint: str,
        *,
        describe: Mapping[str, Any] | None = None,
    ) -> None:
        self.folder = Path(folder)
        self._shards = {shard.filename: shard for shard in shards}
        self._entries = {k: entry for shard in shards for k, entry in shard.tensors.items()}
        planned = sum(len(shard.tensors) for shard in shards)
        if not shards or len(self._shards) != len(shards) or len(self._entries) != planned:
            raise ValueError(f"{folder}: expected files and tensors with distinct names.")
        self._pending: dict[str, str] = {}
        self._files: dict[str, int] = {}
        layout = hashlib.sha256()
        for shard in shards:
            layout.update(shard.filename.encode() + b"\0" + shard.header_bytes)
        head = {
            "fingerprint": fingerprint,
            "layout": layout.hexdigest(),
            "describe": dict(describe or {}),
        }
        with explained(self.folder, 0):
            self.folder.mkdir(parents=True, exist_ok=True)
        with contextlib.ExitStack() as undo:
            self._lock = ProcessLock(Path(f"{journal_path}.lock"))
            undo.callback(self._lock.release)
            undo.callback(self._close_files)
            self._journal = self._begin(Path(journal_path), head)
            undo.pop_all()

    def __enter__(self) -> CheckpointWriter:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def done(self) -> set[str]:
        """Batches that need no work: those in the journal."""
        return set(self._journal.records)

    def records(self) -> dict[str, Any]:
        """Batch -> its record, as read back from JSON (so a resumed run sees the same values)."""
        return dict(self._journal.records)

    def hashes(self) -> dict[str, str]:
        """Tensor name -> sha256 of its bytes, for all committed tensors, in file order."""
        found = self._journal.hashes
        return {name: found[name] for name in self._entries if name in found}

    def read(self, name: str) -> Tensor:
        """A committed tensor, read back.

        Raises:
            ValueError: unknown name, or not committed.
        """
        if name not in self._journal.hashes:
            raise ValueError(f"{name}: not a committed tensor.")
        entry = self._entries[name]
        data = os.pread(self._files[entry.file], entry.nbytes, entry.offset_begin)
        if len(data) != entry.nbytes:
            raise CheckpointError(f"{self.folder / entry.file}: ends within {name}.")
        return torch.frombuffer(bytearray(data), dtype=DTYPES[entry.dtype]).view(entry.shape)

    def write(self, name: str, tensor: Tensor) -> None:
        """Write a contiguous CPU tensor at its place.

        Raises:
            ValueError: unknown name, tensor unlike its plan, or already committed.
            CheckpointError: the disk is full; the batch can be redone after a restart.
        """
        entry = self._entry(name)
        found = (tuple(tensor.shape), tensor.dtype, tensor.device.type)
        wanted = (entry.shape, DTYPES[entry.dtype], "cpu")
        if found != wanted or not tensor.is_contiguous():
            layout = "" if tensor.is_contiguous() else " not contiguous"
            raise ValueError(f"{name}: got {found}{layout}, planned {wanted} contiguous.")
        # A view of the tensor's memory that needs no NumPy and knows every dtype.
        array = (ctypes.c_ubyte * tensor.nbytes).from_address(tensor.data_ptr())
        self._put(entry, memoryview(array).cast("B"))

    def write_bytes(self, name: str, data: bytes | memoryview) -> None:
        """Write raw bytes (such as `Checkpoint.read_bytes` gives) at a tensor's place."""
        entry, view = self._entry(name), memoryview(data).cast("B")
        if view.nbytes != entry.nbytes:
            raise ValueError(f"{name}: got {view.nbytes} bytes, planned {entry.nbytes}.")
        self._put(entry, view)

    def commit(self, batch: str, record: Mapping[str, Any]) -> None:
        """Make all tensors written since the last commit durable, as `batch`, with its record.

        Raises:
            ValueError: the batch was committed before.
        """
        if batch in self._journal.records:
            raise ValueError(f"batch {batch!r} is committed already; skip batches in `done`.")
        written = dict(self._pending)
        with explained(self.folder, sum(self._entries[name].nbytes for name in written)):
            for filename in sorted({self._entries[name].file for name in written}):
                os.fsync(self._files[filename])
        self._journal.append(batch, written, record)
        for name in written:
            del self._pending[name]

    def finish(self, extra_files: Mapping[str, bytes]) -> None:
        """Give everything its final name: shards, index, then `extra_files` in the order given.

        Give config.json last: a folder without it is unfinished for every reader. Lock and
        journal are removed at the end.

        Raises:
            ValueError: tensors were not written or not committed.
        """
        missing = [name for name in self._entries if name not in self._journal.hashes]
        if missing:
            shown = ", ".join(missing[:5])
            raise ValueError(f"{self.folder}: {len(missing)} tensors not committed: {shown}.")
        texts = {**index_files(self._shards.values()), **extra_files}
        for name, content in texts.items():
            write_partial(self.folder / name, content)
        self._journal.mark_finishing()
        for name in reversed(texts):  # of an earlier run: new shards must never meet an old index
            (self.folder / name).unlink(missing_ok=True)
        sync_folder(self.folder)
        for name in [*self._shards, *texts]:
            path = self.folder / name
            if partial(path).exists():
                publish(path)
        self.close()
        self._journal.path.unlink(missing_ok=True)  # last: until here the same calls resume
        sync_folder(self._journal.path.parent)

    def close(self) -> None:
        """Close files and release the lock; a second call does nothing."""
        self._journal.close()
        self._close_files()
        self._lock.release()

    def _begin(self, journal_path: Path, head: Mapping[str, Any]) -> Journal:
        if not journal_path.exists():
            self._lay_out()
            return Journal.create(journal_path, head)
        journal = Journal.load(journal_path)
        try:
            journal.check(head)
            for shard in self._shards.values():
                self._files[shard.filename] = self._reopen(shard, journal)
        except BaseException:
            journal.close()
            raise
        return journal

    def _lay_out(self) -> None:
        """Make every partial file at its full size, or none."""
        needed = sum(shard.nbytes for shard in self._shards.values())
        with explained(self.folder, needed):
            try:
                self._discard_partial()
                check_space(self.folder, needed)
                for name, shard in self._shards.items():
                    self._files[name] = self._create(shard)
            except BaseException:
                self._discard_partial()  # frees the space again, before it is counted
                raise

    def _create(self, shard: ShardFile) -> int:
        path = partial(self.folder / shard.filename)
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o666)
        try:
            reserve(descriptor, shard.nbytes)
            pwrite_all(descriptor, shard.header_bytes, 0)
            os.fsync(descriptor)
            sync_folder(path.parent)
        except BaseException:
            os.close(descriptor)
            raise
        return descriptor

    def _discard_partial(self) -> None:
        self._close_files()
        for name in self._shards:
            partial(self.folder / name).unlink(missing_ok=True)

    def _reopen(self, shard: ShardFile, journal: Journal) -> int:
        path = self.folder / shard.filename
        if partial(path).exists() or not journal.finishing:
            path = partial(path)
        with contextlib.suppress(FileNotFoundError):
            descriptor = os.open(path, os.O_RDWR)
            header = os.pread(descriptor, len(shard.header_bytes), 0)
            if os.fstat(descriptor).st_size == shard.nbytes and header == shard.header_bytes:
                return descriptor
            os.close(descriptor)
        raise CheckpointError(
            f"{path}: missing or altered since the run was interrupted. Delete the output folder "
            "and start again."
        )

    def _entry(self, name: str) -> TensorEntry:
        if name not in self._entries:
            raise ValueError(f"{name}: not a tensor of the planned files.")
        if name in self._journal.hashes:
            raise ValueError(f"{name}: committed already; skip batches in `done`.")
        return self._entries[name]

    def _put(self, entry: TensorEntry, data: memoryview) -> None:
        with explained(self.folder / entry.file, entry.nbytes):
            pwrite_all(self._files[entry.file], data, entry.offset_begin)
        self._pending[entry.name] = hashlib.sha256(data).hexdigest()

    def _close_files(self) -> None:
        for descriptor in self._files.values():
            os.close(descriptor)
        self._files.clear()
