"""An ensemble by the metrics of its task, where there are no classes: spans, answers, texts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from loftq.lab.ensemble.result import AverageResult
from loftq.tasks import TaskResult, evaluate, find_task
from loftq.tasks.config import TaskConfig


def score_by_metrics(
    ensemble: Path,
    members: Sequence[TaskResult],
    *,
    data: str | Path | None = None,
    device: str | None = None,
    options: Mapping[str, Any],
) -> AverageResult:
    """Score the average of the members as each of them was scored at the end of its training.

    The loss of the mean probability of the next token, -log (1/M) sum_m p_m, is on every token at
    most the mean of the members' losses (Jensen); of scores of generated text nothing is known.

    Args:
        ensemble: folder with ensemble.json.
        members: finished.
        data: folder of the data sets; None = LOFTQ_DATA, else the hub.
        device: cpu or cuda; None = the GPU if there is one.
        options: with which the members were trained; rows, batches and beams are taken from them.

    Raises:
        ValueError: members that cannot be computed together.
    """
    chosen = find_task(members[0].task)
    found = evaluate(
        ensemble,
        chosen,
        data=data,
        device=device,
        limit=options.get("eval_rows"),
        batch_size=options.get("eval_batch_size", TaskConfig.eval_batch_size),
        beams=options.get("beams", TaskConfig.beams),
    )
    return AverageResult(
        task=chosen.name,
        primary=chosen.primary,
        members=tuple(member.metrics for member in members),
        ensemble=found.metrics,
    )
