"""The members of an ensemble, fine-tuned one by one on one packed backbone.

They share the backbone and the product that the start stands for; the seed decides the factors of
the start, the head, the order of the rows and dropout.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from loftq.checkpoint.durable import publish, write_partial
from loftq.integrations.discover import load_config
from loftq.integrations.gauge import rotated_start
from loftq.integrations.members import ENSEMBLE
from loftq.lab.ensemble.average import score_by_metrics
from loftq.lab.ensemble.picture import draw_reliability
from loftq.lab.ensemble.result import AverageResult, EnsembleResult
from loftq.lab.ensemble.score import of_probabilities, score_ensemble
from loftq.lab.locks import Locks
from loftq.tasks import TaskError, TaskResult, find_task, train_task
from loftq.tasks.kinds.classification import Probabilities
from loftq.train.listener import Listener

PICTURE = "reliability.svg"


@dataclass(frozen=True)
class Follower:
    """Told how the members are trained; does nothing by itself."""

    begun: Callable[[int, int, int], object] = field(default=lambda seed, place, total: None)
    """A member begins: its seed, its place (from 1), how many there are."""
    ended: Callable[[TaskResult], object] = field(default=lambda result: None)
    """A member is trained, by this call or by an earlier one."""
    listener: Listener | None = None
    """Told of the steps of each."""


def train_ensemble(
    base: str | Path,
    task: str,
    output: str | Path,
    *,
    members: int,
    data: str | Path | None = None,
    device: str | None = None,
    outside: tuple[str, ...] = (),
    follower: Follower | None = None,
    **options: Any,
) -> EnsembleResult | AverageResult:
    """Fine-tune the members that are not there yet, and score them together.

    Args:
        base: output of `loftq quantize`.
        task: any whose model predicts probabilities: of classes, of spans, of the next token.
        output: folder; an interrupted call goes on. It gets ensemble.json (members and scores) and,
            where there are classes, reliability.svg; it can be given to `loftq eval`.
        members: how many, at least 2.
        data: folder of the data sets; None = LOFTQ_DATA, else the hub.
        device: cpu or cuda; None = the GPU if there is one.
        outside: other tasks of classes, whose rows the ensemble should be unsure of.
        follower: told how it goes.
        **options: of `train_task`; `seed` is of the first member. weight_decay, early_stop and kl
            keep members from fitting the training rows too closely.

    Returns:
        EnsembleResult where there are classes, else AverageResult, by the metrics of the task.

    Raises:
        TaskError: as `train_members`, or `outside` where there are no classes.
    """
    output = Path(output)
    for name in (task, *outside) if outside else ():
        of_probabilities(name)
    trained = train_members(
        base, task, output, members=members, data=data, device=device, follower=follower, **options
    )
    found: EnsembleResult | AverageResult
    if isinstance(find_task(task), Probabilities):
        found = score_ensemble(
            [result.folder for result in trained],
            task,
            data=data,
            device=device,
            eval_rows=options.get("eval_rows"),
            outside=outside,
        )
        draw_reliability(found, output / PICTURE)
    else:
        found = score_by_metrics(output, trained, data=data, device=device, options=options)
    _record(output, task, [result.folder for result in trained], found.to_dict())
    return found


def train_members(
    base: str | Path,
    task: str,
    output: str | Path,
    *,
    members: int,
    data: str | Path | None = None,
    device: str | None = None,
    follower: Follower | None = None,
    **options: Any,
) -> list[TaskResult]:
    """Fine-tune the members that are not there yet.

    Arguments as of `train_ensemble`. The folder can be given to `loftq eval` and, where the model
    continues text, to `loftq chat`: probabilities of the next token are averaged. Several processes
    with the same call share the members; each waits for all of them.

    Returns:
        What each member came to, by seed.

    Raises:
        TaskError: fewer than two members, a base that is no output of `quantize` or is an
            encoder-decoder, or a task whose model predicts no probabilities.
    """
    base, output, told = Path(base), Path(output), follower or Follower()
    if members < 2:
        raise TaskError(f"members={members}: an ensemble has at least 2.")
    _refuse(base, task)
    first = int(options.pop("seed", 0))
    seeds = range(first, first + members)
    output.mkdir(parents=True, exist_ok=True)
    _record(output, task, [_run(output, seed) for seed in seeds], None)
    locks, found = Locks(output), dict[int, TaskResult]()
    for held in (locks.free, locks.waiting):  # what another process trains comes last
        for place, seed in enumerate(seeds, 1):
            if seed in found:
                continue
            with held(str(seed)) as ours:
                if not ours:
                    continue
                told.begun(seed, place, members)
                found[seed] = train_task(
                    _start(base, output, seed), task, _run(output, seed),
                    data=data, device=device, seed=seed, listener=told.listener, **options,
                )  # fmt: skip
            told.ended(found[seed])
    return [found[seed] for seed in seeds]


def _run(output: Path, seed: int) -> Path:
    """Where the member of a seed is trained."""
    return output / "members" / str(seed)


def _start(base: Path, output: Path, seed: int) -> Path:
    """The start of a member, made if it is not whole; its base.json is written last."""
    start = output / "starts" / str(seed)
    if not (start / "base.json").is_file():
        shutil.rmtree(start, ignore_errors=True)
        rotated_start(base, start, seed=seed)
    return start


def _refuse(base: Path, task: str) -> None:
    """What would only be found out after the members are trained."""
    if not (base / "loftq.json").is_file():
        raise TaskError(
            f"{base}: not an output of `loftq quantize` (no loftq.json). Members start from one: "
            f"loftq quantize MODEL -o OUT, then loftq lab ensemble OUT --task {task} -o ENSEMBLE."
        )
    if not find_task(task).predicts_probabilities:
        raise TaskError(f"{task}: predicts a number; an ensemble averages probabilities.")
    if getattr(load_config(base), "is_encoder_decoder", False):
        raise TaskError(
            f"{base}: an encoder-decoder; members are computed together for encoders and decoders."
        )


def _record(output: Path, task: str, runs: list[Path], scores: dict[str, Any] | None) -> None:
    names = [str(run.relative_to(output)) for run in runs]
    record = {"version": 1, "task": task, "members": names, "scores": scores}
    path = output / ENSEMBLE
    with Locks(output).waiting("record"):
        write_partial(path, f"{json.dumps(record, indent=2)}\n".encode())
        publish(path)
