"""Ensembles of adapters on one packed backbone (arXiv:2310.00035).

Members are fine-tuned one by one, through `loftq train --task`. They share the backbone and the
product that the start stands for; the seed decides the factors of the start, the head, the order of
the rows and dropout. Their probabilities are averaged.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from loftq.eval import reliability as scores
from loftq.integrations.gauge import rotated_start
from loftq.tasks import TaskError, find_task, train_task
from loftq.tasks.scores import bootstrapped
from loftq.tasks.sources import read_split, some

if TYPE_CHECKING:
    from numpy.typing import NDArray


@dataclass(frozen=True, kw_only=True)
class Quality:
    """Scores of predicted probabilities."""

    accuracy: float
    nll: float
    """Nats a row."""
    brier: float
    ece: float
    """Expected calibration error, 15 bins."""
    ece_interval: tuple[float, float]
    """95 % by resampling rows; the error of a finite sample is biased upwards in itself."""


@dataclass(frozen=True, kw_only=True)
class EnsembleResult:
    """What an ensemble gains over its members."""

    task: str
    split: str
    rows: int
    members: tuple[Quality, ...]
    ensemble: Quality
    disagreement: float
    """Mean share of rows on which two members differ."""
    divergence: float
    """Mean KL(member || ensemble), nats."""
    diagram: tuple[Mapping[str, Any], ...]
    """Bars of the ensemble's reliability diagram."""

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready."""
        return asdict(self)


def train_ensemble(
    base: Path,
    task: str,
    output: Path,
    *,
    members: int,
    data: Path | None = None,
    device: str | None = None,
    **options: Any,
) -> EnsembleResult:
    """Fine-tune the members that are not there yet, and score them together.

    Args:
        base: output of `loftq quantize`.
        task: a classification.
        output: folder; an interrupted call goes on.
        members: how many, at least 2.
        data: folder of the data sets; None = LOFTQ_DATA, else the hub.
        device: cpu or cuda; None = the GPU if there is one.
        **options: of `train_task`; `seed` is of the first member. weight_decay and early_stop keep
            members from fitting the training rows too closely.

    Raises:
        TaskError: not a classification, or fewer than two members.
    """
    chosen = find_task(task)
    if chosen.kind != "classification":
        raise TaskError(f"{task}: is a {chosen.kind}; an ensemble averages class probabilities.")
    if members < 2:
        raise TaskError(f"members={members}: an ensemble has at least 2.")
    first = int(options.pop("seed", 0))
    for seed in range(first, first + members):
        start, run = output / "starts" / str(seed), output / "members" / str(seed)
        if not (start / "base.json").is_file():  # written last
            _remove(start)
            rotated_start(base, start, seed=seed)
        train_task(start, task, run, data=data, device=device, seed=seed, **options)
    return score_ensemble(
        [output / "members" / str(seed) for seed in range(first, first + members)],
        task,
        data=data,
        eval_rows=options.get("eval_rows"),
    )


def score_ensemble(
    runs: list[Path], task: str, *, data: Path | None = None, eval_rows: int | None = None
) -> EnsembleResult:
    """Average the probabilities that finished runs predicted for the reported split.

    Raises:
        TaskError: predictions that are missing or of other rows.
    """
    import numpy as np

    chosen = find_task(task)
    split = chosen.splits.test[0]
    rows = some(read_split(chosen, split, data=data), eval_rows)
    labels = np.array([int(row.values["label"]) for row in rows])
    members = np.stack([_probabilities(run, split, len(rows)) for run in runs])
    mean = members.mean(0)
    return EnsembleResult(
        task=task,
        split=split,
        rows=len(rows),
        members=tuple(quality(member, labels) for member in members),
        ensemble=quality(mean, labels),
        disagreement=scores.disagreement(members),
        divergence=scores.divergence(members),
        diagram=tuple(bar.to_dict() for bar in scores.reliability(mean, labels)),
    )


def quality(probabilities: NDArray[Any], labels: NDArray[Any]) -> Quality:
    """All scores of probabilities (rows, classes) against labels (rows,)."""
    ece = bootstrapped(
        lambda chosen: scores.calibration_error(probabilities[chosen], labels[chosen]), len(labels)
    )
    return Quality(
        accuracy=scores.accuracy(probabilities, labels),
        nll=scores.negative_log_likelihood(probabilities, labels),
        brier=scores.brier(probabilities, labels),
        ece=ece.value,
        ece_interval=(ece.low, ece.high),
    )


def _probabilities(run: Path, split: str, rows: int) -> NDArray[Any]:
    """(rows, classes) of a run's predictions, summing to 1 in spite of their rounding."""
    import numpy as np

    file = run / f"predictions-{split}.jsonl"
    try:
        lines = file.read_text(encoding="utf-8").splitlines()
        found = np.array([json.loads(line)["prediction"]["probabilities"] for line in lines])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise TaskError(f"{file}: no predictions of a classification ({error!r}).") from error
    if len(found) != rows:
        raise TaskError(f"{file}: {len(found)} predictions for {rows} rows; train the member anew.")
    return found / found.sum(-1, keepdims=True)


def _remove(folder: Path) -> None:
    """A start that an interruption left half-written."""
    import shutil

    shutil.rmtree(folder, ignore_errors=True)
