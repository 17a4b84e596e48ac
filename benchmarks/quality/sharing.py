"""Jobs of one folder, shared by all processes that run the same command on it.

    FOLDER/  rows/JOB.json   locks/JOB   process.N.log

A job belongs to the process that holds its lock, and is done when its row is there; whatever stops
a process, the same command goes on with what is left. A job that fails leaves a row that says why.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from loftq.checkpoint.durable import publish, write_partial
from loftq.lab.locks import PATIENCE, Locks

FAILED, SETTINGS = "failed", "settings"


@dataclass(frozen=True, kw_only=True)
class Job:
    """Something that gives a row."""

    name: str
    work: Callable[[], dict[str, Any]]
    after: str | None = None
    """Job whose row it needs."""


class Rows:
    """The rows of a folder."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.locks = folder, Locks(folder)
        (folder / "rows").mkdir(parents=True, exist_ok=True)

    def claim(self, settings: dict[str, Any]) -> None:
        """Make the folder that of rows made with these settings.

        Raises:
            ValueError: it holds rows of others.
        """
        job = Job(name=SETTINGS, work=lambda: {SETTINGS: settings})
        while (there := self.find(SETTINGS)) is None:
            if not self.settle(job):
                time.sleep(PATIENCE)
        other = [key for key, value in settings.items() if there[SETTINGS].get(key) != value]
        if other:
            told = ", ".join(f"{key}={there[SETTINGS].get(key)}" for key in other)
            raise ValueError(
                f"{self.folder}: holds rows made with {told}. Ask for the same, or choose another "
                "folder."
            )

    def find(self, name: str) -> dict[str, Any] | None:
        """A job's row, None while it is not done."""
        path = self._path(name)
        return json.loads(path.read_text()) if path.exists() else None

    def succeeded(self, name: str) -> bool:
        """Whether a job is done and has not failed."""
        row = self.find(name)
        return row is not None and FAILED not in row

    def forget_failures(self) -> None:
        """Have jobs that failed done again."""
        for path in (self.folder / "rows").glob("*.json"):
            if FAILED in json.loads(path.read_text()):
                path.unlink()

    def settle(self, job: Job) -> bool:
        """Do a job unless it is done, or another process is at it; whether it was done here."""
        with self.locks.free(_file_name(job.name)) as ours:
            if not ours or self.find(job.name) is not None:
                return False
            self._put(job.name, _row(job))
            return True

    def _put(self, name: str, row: dict[str, Any]) -> None:
        path = self._path(name)
        write_partial(path, (json.dumps(row, indent=1) + "\n").encode())
        publish(path)

    def _path(self, name: str) -> Path:
        return self.folder / "rows" / f"{_file_name(name)}.json"


def _file_name(job: str) -> str:
    return job.replace(":", "_").replace("/", "-")


def share(rows: Rows, jobs: Sequence[Job], *, late: Callable[[], bool]) -> None:
    """Do jobs until all have a row, or it is late; jobs that need one that failed are left out."""
    left = list(jobs)
    while left and not late():
        left = [job for job in left if rows.find(job.name) is None and not _lost(rows, job)]
        ready = (job for job in left if job.after is None or rows.succeeded(job.after))
        if not any(map(rows.settle, ready)):
            time.sleep(PATIENCE)


def launch(processes: int, folder: Path, arguments: Sequence[str]) -> None:
    """Run this script `processes` times with other arguments, and wait; logs go to the folder."""
    folder.mkdir(parents=True, exist_ok=True)
    running = []
    for _ in range(processes):
        log = (folder / f"process.{os.getpid()}.{len(running)}.log").open("w")
        command = [sys.executable, "-W", "ignore", *arguments]
        running.append(subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT))
    for process in running:
        process.wait()


def _lost(rows: Rows, job: Job) -> bool:
    return job.after is not None and FAILED in (rows.find(job.after) or {})


def _row(job: Job) -> dict[str, Any]:
    begin = time.perf_counter()
    try:
        row = job.work()
    except Exception as error:  # a job may fail in any way there is; its row says how
        row = {FAILED: f"{type(error).__name__}: {error}", "trace": traceback.format_exc()}
    row["job_s"] = time.perf_counter() - begin
    said = row.get(FAILED, "done")
    print(f"{job.name}: {said} in {row['job_s']:.1f} s", flush=True)
    return row
