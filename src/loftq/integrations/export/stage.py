"""An output folder that appears complete or not at all."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path

from loftq.checkpoint.durable import ProcessLock, explained, partial, sync_folder
from loftq.integrations.export.source import ExportError

MARK = ".loftq-export"
RECORD = "loftq_export.json"


@contextlib.contextmanager
def staged(output: Path, identity: Mapping[str, object], *, overwrite: bool) -> Iterator[Path]:
    """A folder to write into, FOLDER.partial; it takes its name when the block ends well.

    After an error or a kill it stays, and the same export goes on in it.

    Args:
        output: the folder to be.
        identity: what is exported and how; a partial folder of something else is refused.
        overwrite: replace an earlier export.

    Raises:
        ExportError: output exists, or a partial folder of another export is in the way.
        CheckpointError: no space, no permission, or another process writes here.
    """
    output = output.absolute()
    check_output(output, overwrite=overwrite)
    folder = partial(output)
    with explained(output, 0):
        output.parent.mkdir(parents=True, exist_ok=True)
    lock = ProcessLock(folder.with_name(folder.name + ".lock"))
    try:
        _begin(folder, identity)
        try:
            yield folder
        except BaseException:
            _discard_empty(folder)
            raise
        _publish(folder, output)
        (output / MARK).unlink()
    finally:
        lock.release()


def check_output(output: Path, *, overwrite: bool) -> None:
    """Refuse a folder that holds anything but an earlier export of ours.

    Raises:
        ExportError: see above.
    """
    if output.is_file():
        raise ExportError(f"{output}: a file. Name a folder to be made with -o.")
    if not output.is_dir() or not any(output.iterdir()):
        return
    ours = (output / RECORD).is_file()
    if not ours or not overwrite:
        remedy = "or replace it with --overwrite" if ours else "or empty it yourself"
        held = "holds an earlier export" if ours else "is not empty, and not an export of loftq"
        raise ExportError(f"{output}: {held}. Choose another folder with -o, {remedy}.")


def _begin(folder: Path, identity: Mapping[str, object]) -> None:
    mark = hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()
    if folder.exists():
        found = (folder / MARK).read_text() if (folder / MARK).is_file() else None
        if found != mark:
            raise ExportError(
                f"{folder}: left by an unfinished export of something else. Delete it, or choose "
                "another folder with -o."
            )
        return
    with explained(folder, 0):
        folder.mkdir()
        (folder / MARK).write_text(mark)


def _discard_empty(folder: Path) -> None:
    """Nothing to go on with: an export that was refused before it wrote leaves no folder."""
    if [path.name for path in folder.iterdir()] == [MARK]:
        (folder / MARK).unlink()
        folder.rmdir()


def _publish(folder: Path, output: Path) -> None:
    old = output.with_name(output.name + ".replaced")
    for path in folder.rglob("*"):
        if path.is_dir():
            sync_folder(path)
    sync_folder(folder)
    if output.exists() and any(output.iterdir()):
        shutil.rmtree(old, ignore_errors=True)
        os.replace(output, old)
    os.replace(folder, output)
    sync_folder(output.parent)
    shutil.rmtree(old, ignore_errors=True)
