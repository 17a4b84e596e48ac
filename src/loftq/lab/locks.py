"""Several processes on one folder: a piece of work belongs to the process that holds its lock."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from loftq.checkpoint.durable import ProcessLock
from loftq.checkpoint.header import CheckpointError

LOCKS = "locks"
"""Folder of the lock files, inside the one that is shared."""
PATIENCE = 0.5  # seconds between looks at what another process is doing


@dataclass(frozen=True)
class Locks:
    """Locks by name. A process that dies lets go of its own."""

    shared: Path
    """The folder that the processes work on."""

    @contextmanager
    def free(self, name: str) -> Iterator[bool]:
        """Whether the lock of that name is ours; another process's is left alone."""
        folder = self.shared / LOCKS
        folder.mkdir(parents=True, exist_ok=True)
        try:
            lock = ProcessLock(folder / name)
        except CheckpointError:
            yield False
            return
        try:
            yield True
        finally:
            lock.release()

    @contextmanager
    def waiting(self, name: str) -> Iterator[bool]:
        """The lock of that name, as soon as nobody else has it; it is ours then."""
        while True:
            with self.free(name) as ours:
                if ours:
                    yield True
                    return
            time.sleep(PATIENCE)
