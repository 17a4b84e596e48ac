"""Files that survive a crash: space reserved first, whole files renamed into place, one writer."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import shutil
import socket
import warnings
from collections.abc import Iterator
from pathlib import Path

from loftq.checkpoint.header import CheckpointError

NO_SPACE = (errno.ENOSPC, errno.EDQUOT)
NOT_ALLOWED = (errno.EACCES, errno.EPERM, errno.EROFS, errno.EEXIST, errno.ENOTDIR)
NOT_SUPPORTED = (errno.EOPNOTSUPP, errno.EINVAL, errno.ENOSYS, errno.ENOLCK)


@contextlib.contextmanager
def explained(path: Path, needed: int) -> Iterator[None]:
    """Turn a full disk or an unwritable place into a CheckpointError that says what to do.

    Args:
        path: the file (or folder) being written.
        needed: bytes that were to be written there.
    """
    try:
        yield
    except OSError as error:
        if error.errno in NO_SPACE:
            free = shutil.disk_usage(path if path.is_dir() else path.parent).free
            raise CheckpointError(
                f"{path}: no space left: {needed} bytes needed, {free} bytes free. Free some "
                "space and run the same command again: it resumes."
            ) from error
        if error.errno in NOT_ALLOWED:
            raise CheckpointError(
                f"{path}: cannot be written ({error.strerror}). Choose an output folder that you "
                "may write to."
            ) from error
        raise


def partial(path: Path) -> Path:
    """The name under which `path` is written until it is complete."""
    return path.with_name(path.name + ".partial")


def check_space(folder: Path, needed: int) -> None:
    """Raise ENOSPC now if `folder` has less than `needed` bytes free."""
    if shutil.disk_usage(folder).free < needed:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def reserve(descriptor: int, size: int) -> None:
    """Give an empty file `size` bytes of disk now, so that a full disk is found before any work.

    Where the system cannot reserve (macOS, some network file systems) only the length is set: a
    disk that fills up meanwhile is then found by a later write, which says the same.
    """
    try:
        os.posix_fallocate(descriptor, 0, size)
        return
    except AttributeError:
        pass
    except OSError as error:
        if error.errno not in NOT_SUPPORTED:
            raise
    os.ftruncate(descriptor, size)


def pwrite_all(descriptor: int, data: bytes | memoryview, offset: int) -> None:
    """Write all of `data` at `offset`; one system call up to 2 GiB."""
    view = memoryview(data)
    while view:
        written = os.pwrite(descriptor, view, offset)
        view, offset = view[written:], offset + written


def write_partial(path: Path, content: bytes) -> None:
    """Write `content` durably beside `path`, under its partial name."""
    with explained(path, len(content)):
        path.parent.mkdir(parents=True, exist_ok=True)
        flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW
        descriptor = os.open(partial(path), flags, 0o666)
        try:
            pwrite_all(descriptor, content, 0)
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def publish(path: Path) -> None:
    """Give a complete partial file its final name, durably."""
    os.replace(partial(path), path)
    sync_folder(path.parent)


def sync_folder(folder: Path) -> None:
    """Make the names in `folder` durable."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


class ProcessLock:
    """An exclusive lock file. A process that dies leaves the file, not the lock."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._descriptor = _locked(path)
        os.ftruncate(self._descriptor, 0)
        holder = f"process {os.getpid()} on {socket.gethostname()}"
        os.pwrite(self._descriptor, holder.encode(), 0)

    def release(self) -> None:
        """Remove the file, then let go; a second call does nothing."""
        if self._descriptor >= 0:
            self.path.unlink(missing_ok=True)
            os.close(self._descriptor)
            self._descriptor = -1


def _locked(path: Path) -> int:
    while True:
        with explained(path, 100):
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o666)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno in NOT_SUPPORTED:
                warnings.warn(
                    f"{path}: this file system has no locks; do not run two commands on one "
                    "output folder.",
                    stacklevel=2,
                )
                return descriptor
            holder = os.pread(descriptor, 200, 0).decode(errors="replace") or "another process"
            os.close(descriptor)
            if error.errno not in (errno.EWOULDBLOCK, errno.EACCES):
                raise
            raise CheckpointError(
                f"{path.parent}: {holder} is writing here. Wait for it, stop it, or choose "
                "another output folder."
            ) from None
        # The holder before us may have removed the file between our open and our lock.
        if path.exists() and os.path.samestat(os.fstat(descriptor), path.stat()):
            return descriptor
        os.close(descriptor)
