"""What every target is given, and what it gives back."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from loftq.checkpoint import CheckpointWriter, ShardFile
from loftq.integrations.export.source import ExportSource

JOURNAL = ".loftq-export.jsonl"
COMMIT_BYTES = 1 << 29
"""Written between two commits: what a kill can cost."""
ADAPTER = "adapter"

Step = Callable[[int, int], object]
"""Called after each tensor, written or checked, with how many of how many are done."""


@dataclass(frozen=True, kw_only=True)
class Job:
    """One export under way."""

    source: ExportSource
    folder: Path
    """Where to write; it takes the name `output` in the end."""
    output: Path
    options: Mapping[str, Any] = field(default_factory=dict)
    """base, dtype, vocab, max_shard_bytes: those that were given."""
    step: Step = lambda done, total: None


class Tensors:
    """Tensors written one by one into planned files; a rerun skips what was committed.

    Args:
        job: where to write.
        shards: the files.
        total: tensors that will be written, for progress.
    """

    def __init__(self, job: Job, shards: list[ShardFile], total: int) -> None:
        fingerprint = json.dumps([job.source.fingerprint(), str(job.output), dict(job.options)])
        self._writer = CheckpointWriter(job.folder, shards, job.folder / JOURNAL, fingerprint)
        self._job, self._total = job, total
        self._done, self._pending, self._batch = 0, 0, ""
        self._known = self._writer.hashes()

    def __enter__(self) -> Tensors:
        return self

    def __exit__(self, *_: object) -> None:
        self._writer.close()

    def add(self, name: str, names: list[str], make: Callable[[], Mapping[str, Any]]) -> None:
        """Write the tensors `names` as `make` gives them (tensors, or bytes as they lie in a file).

        Args:
            name: of this unit of work, unique; nothing is made if it was committed before.
            names: the tensors.
            make: called if they are still to be written.
        """
        if not all(tensor in self._known for tensor in names):
            for tensor, data in make().items():
                if isinstance(data, memoryview):
                    self._writer.write_bytes(tensor, data)
                else:
                    self._writer.write(tensor, data.contiguous())
                self._pending += data.nbytes
            self._batch = name
            if self._pending >= COMMIT_BYTES:
                self._commit()
        self._done += 1
        self._job.step(self._done, self._total)

    def finish(self, files: Mapping[str, bytes]) -> None:
        """The last tensors, then the files beside them, config.json last."""
        if self._batch:
            self._commit()
        self._writer.finish(files)

    def _commit(self) -> None:
        self._writer.commit(self._batch, {})
        self._pending, self._batch = 0, ""


def as_json(value: Any) -> bytes:
    """Readable JSON."""
    return (json.dumps(value, indent=2, ensure_ascii=False) + "\n").encode()
