"""The folder of a run: claimed by one command, begun anew or gone on with, never written over."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from loftq.checkpoint.durable import ProcessLock
from loftq.integrations.run_folder import RunFolder
from loftq.train import resume
from loftq.train.errors import TrainError
from loftq.train.place import Place


def refuse_own_output(model: str, run: RunFolder) -> None:
    """Refuse to write a run over the one that it goes on from."""
    if (run.path / "base.json").is_file() and Path(model).resolve() == run.path.resolve():
        raise TrainError(f"{model}: MODEL is the run itself. Choose another folder with -o.")


def refuse_others(run: RunFolder, *, digest: str, backbone: str) -> None:
    """Refuse to go on with a run that began with other rows or another backbone.

    Raises:
        TrainError: saying which.
    """
    if json.loads(run.data.read_text(encoding="utf-8")).get("digest") != digest:
        raise TrainError(
            f"{run.path}: holds an unfinished run on other data: a file has changed, or it is "
            "tokenized differently. Restore the data, or start anew with --overwrite."
        )
    then = run.base().backbone
    if then != backbone:
        raise TrainError(
            f"{run.path}: holds an unfinished run on backbone {then[:12]}, and this one is "
            f"{backbone[:12]}. Give the same model, or start anew with --overwrite."
        )


def begin(
    run: RunFolder, place: Place, settings: dict[str, Any], *, overwrite: bool
) -> resume.Checkpoint | None:
    """The checkpoint to go on from, or None after clearing the folder for a fresh start."""
    with place.main_first():
        checkpoint = None if overwrite else resume.last_checkpoint(run)
        if checkpoint is not None:
            refuse_differences(run, resume.differences(run, settings), finished=False)
        elif place.is_main:
            resume.clear(run)
    return checkpoint


def refuse_differences(run: RunFolder, found: list[str], *, finished: bool) -> None:
    """Refuse settings that are others than those of the run in the folder."""
    if found:
        state = "a finished run" if finished else "an unfinished run"
        raise TrainError(
            f"{run.path}: holds {state} with other settings ({'; '.join(found)}). Choose another "
            "folder with -o, give its own settings, or replace it with --overwrite."
        )


@contextlib.contextmanager
def claimed(run: RunFolder, place: Place) -> Iterator[None]:
    """No second command writes into the folder meanwhile."""
    if not place.is_main:
        yield
        return
    resume.refuse_foreign(run)
    run.path.mkdir(parents=True, exist_ok=True)
    lock = ProcessLock(run.path / resume.LOCK)
    try:
        yield
    finally:
        lock.release()
