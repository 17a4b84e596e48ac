"""What is already safely on disk: one JSON line per finished batch, after a line saying of what.

A line is written only when its tensors are durable, so a batch is either in the journal or redone.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from loftq.checkpoint.durable import explained, publish, pwrite_all, write_partial
from loftq.checkpoint.header import CheckpointError

VERSION = 1


class Journal:
    """An append-only record of finished batches; opened afresh or from an interrupted run."""

    def __init__(self, path: Path, lines: list[dict[str, Any]], end: int) -> None:
        self.path = path
        self.head = lines[0]
        self.records: dict[str, Any] = {}
        self.hashes: dict[str, str] = {}
        self.finishing = False
        for line in lines[1:]:
            self._take(line)
        self._end = end
        self._descriptor = os.open(path, os.O_WRONLY)
        os.ftruncate(self._descriptor, end)

    @classmethod
    def create(cls, path: Path, head: Mapping[str, Any]) -> Journal:
        """A new journal whose first line is `head`; it appears complete or not at all."""
        line = _encode({"journal": VERSION, **head})
        write_partial(path, line)
        publish(path)
        return cls(path, [json.loads(line)], len(line))

    @classmethod
    def load(cls, path: Path) -> Journal:
        """The journal at `path`; a torn last line, left by a kill, is dropped.

        Raises:
            CheckpointError: another line is unreadable, or the journal is of another version.
        """
        lines: list[dict[str, Any]] = []
        end, raw = 0, path.read_bytes().splitlines(keepends=True)
        for number, line in enumerate(raw, 1):
            content = _decode(line)
            if content is None and (number < len(raw) or number == 1):
                raise CheckpointError(
                    f"{path}: line {number} is damaged. Delete the output folder and start again."
                )
            if content is not None:
                lines.append(content)
                end += len(line)
        if not lines or lines[0].get("journal") != VERSION:
            raise CheckpointError(
                f"{path}: not a journal of version {VERSION}. Finish the run with the version of "
                "loftq that began it, or delete the output folder and start again."
            )
        return cls(path, lines, end)

    def check(self, head: Mapping[str, Any]) -> None:
        """Refuse to continue a run of another input or with other settings; say what differs."""
        now = json.loads(_encode(head))
        then = {key: self.head.get(key) for key in now}
        if now == then:
            return
        now |= now.pop("describe")
        then |= then.pop("describe") or {}
        changes = [
            f"{key}: {then.get(key)!r} then, {now.get(key)!r} now"
            for key in sorted(now.keys() | then.keys())
            if now.get(key) != then.get(key)
        ]
        raise CheckpointError(
            f"{self.path.parent}: holds an unfinished run that differs ({'; '.join(changes)}). "
            "Run it again with its own settings and input, delete the folder, or choose another."
        )

    def append(self, batch: str, hashes: Mapping[str, str], record: Mapping[str, Any]) -> None:
        """Add a finished batch durably."""
        self._write({"batch": batch, "sha256": dict(hashes), "record": dict(record)})

    def mark_finishing(self) -> None:
        """Note durably that files may from now on bear their final names."""
        if not self.finishing:
            self._write({"finishing": True})

    def close(self) -> None:
        """Close the file; it stays for a resume."""
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1

    def _write(self, content: dict[str, Any]) -> None:
        line = _encode(content)
        with explained(self.path, len(line)):
            pwrite_all(self._descriptor, line, self._end)
            os.fsync(self._descriptor)
        self._end += len(line)
        self._take(json.loads(line))  # as a resumed run would read it

    def _take(self, line: dict[str, Any]) -> None:
        if "batch" in line:
            self.records[line["batch"]] = line["record"]
            self.hashes |= line["sha256"]
        self.finishing |= "finishing" in line


def _encode(content: Mapping[str, Any]) -> bytes:
    return json.dumps(content, separators=(",", ":")).encode() + b"\n"


def _decode(line: bytes) -> dict[str, Any] | None:
    """The object on a complete line, else None."""
    try:
        content = json.loads(line) if line.endswith(b"\n") else None
    except ValueError:
        return None
    return content if isinstance(content, dict) else None
