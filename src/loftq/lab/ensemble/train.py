"""The members of an ensemble, fine-tuned one by one on one packed backbone.

They share the backbone and the product that the start stands for; the seed decides the factors of
the start, the head, the order of the rows and dropout.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from loftq.checkpoint.durable import publish, write_partial
from loftq.integrations.gauge import rotated_start
from loftq.integrations.members import ENSEMBLE
from loftq.lab.ensemble.picture import draw_reliability
from loftq.lab.ensemble.result import EnsembleResult
from loftq.lab.ensemble.score import of_probabilities, score_ensemble
from loftq.tasks import TaskError, find_task, train_task

PICTURE = "reliability.svg"


def train_ensemble(
    base: str | Path,
    task: str,
    output: str | Path,
    *,
    members: int,
    data: str | Path | None = None,
    device: str | None = None,
    outside: tuple[str, ...] = (),
    **options: Any,
) -> EnsembleResult:
    """Fine-tune the members that are not there yet, and score them together.

    Args:
        base: output of `loftq quantize`.
        task: a classification or a multiple choice.
        output: folder; an interrupted call goes on. It gets ensemble.json (members and scores) and
            reliability.svg, and can be given to `loftq eval`.
        members: how many, at least 2.
        data: folder of the data sets; None = LOFTQ_DATA, else the hub.
        device: cpu or cuda; None = the GPU if there is one.
        outside: other tasks, whose rows the ensemble should be unsure of.
        **options: of `train_task`; `seed` is of the first member. weight_decay, early_stop and kl
            keep members from fitting the training rows too closely.

    Raises:
        TaskError: a task without class probabilities, or fewer than two members.
    """
    output = Path(output)
    for name in (task, *outside):
        of_probabilities(name)
    runs = train_members(base, task, output, members=members, data=data, device=device, **options)
    found = score_ensemble(
        runs, task, data=data, device=device, eval_rows=options.get("eval_rows"), outside=outside
    )
    _record(output, task, runs, found.to_dict())
    draw_reliability(found, output / PICTURE)
    return found


def train_members(
    base: str | Path,
    task: str,
    output: str | Path,
    *,
    members: int,
    data: str | Path | None = None,
    device: str | None = None,
    **options: Any,
) -> list[Path]:
    """Fine-tune the members that are not there yet, on any task that encoders or decoders learn.

    Arguments as of `train_ensemble`. The folder can be given to `loftq eval` and, where the model
    continues text, to `loftq chat`: probabilities of the next token are averaged.

    Returns:
        The members' runs.

    Raises:
        TaskError: fewer than two members.
    """
    base, output = Path(base), Path(output)
    find_task(task)
    if members < 2:
        raise TaskError(f"members={members}: an ensemble has at least 2.")
    first = int(options.pop("seed", 0))
    runs = []
    for seed in range(first, first + members):
        start, run = output / "starts" / str(seed), output / "members" / str(seed)
        if not (start / "base.json").is_file():  # written last
            shutil.rmtree(start, ignore_errors=True)
            rotated_start(base, start, seed=seed)
        train_task(start, task, run, data=data, device=device, seed=seed, **options)
        runs.append(run)
    _record(output, task, runs, None)
    return runs


def _record(output: Path, task: str, runs: list[Path], scores: dict[str, Any] | None) -> None:
    names = [str(run.relative_to(output)) for run in runs]
    record = {"version": 1, "task": task, "members": names, "scores": scores}
    path = output / ENSEMBLE
    write_partial(path, f"{json.dumps(record, indent=2)}\n".encode())
    publish(path)
