"""All members of an ensemble on the rows of a task, in one pass over one packed backbone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from loftq.integrations.device import default_device
from loftq.lab.ensemble.result import EnsembleResult, result_of
from loftq.nn.members import for_members
from loftq.tasks import TaskError, find_task
from loftq.tasks.base import TaskRow
from loftq.tasks.kinds.batches import in_batches, on_device, scoring
from loftq.tasks.kinds.classification import Probabilities
from loftq.tasks.lengths import reading_length
from loftq.tasks.opening import Opened, open_members
from loftq.tasks.sources import read_split, some

if TYPE_CHECKING:
    from numpy.typing import NDArray

BATCH = 32
"""Rows at a time, each once for every member."""


def of_probabilities(name: str) -> Probabilities:
    """The task of this name.

    Raises:
        TaskError: there is none, or it predicts no probabilities of classes.
    """
    chosen = find_task(name)
    if not isinstance(chosen, Probabilities):
        raise TaskError(
            f"{name}: is a {chosen.kind}, without probabilities of classes; give a classification "
            "or a choice."
        )
    return chosen


def score_ensemble(
    runs: Sequence[Path],
    task: str,
    *,
    data: str | Path | None = None,
    device: str | None = None,
    eval_rows: int | None = None,
    outside: Sequence[str] = (),
) -> EnsembleResult:
    """Score finished runs on one backbone, and the average of their probabilities.

    Args:
        runs: folders of `train_task`, of one task, backbone and rank.
        task: theirs.
        data: folder of the data sets; None = LOFTQ_DATA, else the hub.
        device: cpu or cuda; None = the GPU if there is one.
        eval_rows: score the first so many rows of a fixed shuffle; None = all.
        outside: other tasks, whose rows the ensemble should be unsure of.

    Raises:
        TaskError: runs of another task, or one that predicts no class probabilities.
        ValueError: members that cannot be computed together.
    """
    import numpy as np

    chosen = of_probabilities(task)
    split = chosen.splits.test[0]
    rows = some(read_split(chosen, split, data=data), eval_rows)
    others = {name: _rows(of_probabilities(name), data, len(rows)) for name in outside}
    opened = open_members(runs, chosen)
    opened.model.to(device or default_device())
    members = probabilities(opened, chosen, rows, len(runs))
    labels = np.array([chosen.label(row) for row in rows])
    foreign = {
        name: probabilities(opened, of_probabilities(name), found, len(runs))
        for name, found in others.items()
    }
    return result_of(task, split, members, labels, foreign)


def probabilities(
    opened: Opened, task: Probabilities, rows: Sequence[TaskRow], members: int
) -> NDArray[Any]:
    """(members, rows, classes), float64, each row summing to 1.

    Args:
        opened: from `open_members`, on its device.
        task: whose rows these are; the classes are those of the heads.
        rows: checked.
        members: in the model.
    """
    import numpy as np

    model, tokenizer = opened.model, opened.tokenizer
    config: Any = model.config
    length = reading_length(task, tokenizer, config, opened.settings.get("max_length"))
    features = task.encode(rows, tokenizer, config, length)

    def run(batch: Sequence[Mapping[str, Any]]) -> list[NDArray[Any]]:
        inputs = on_device(task.inputs(batch, tokenizer), model)
        logits = model(**for_members(inputs, members)).logits.double()
        return [*logits.softmax(-1).unflatten(0, (members, -1)).transpose(0, 1).cpu().numpy()]

    with scoring(model):
        found = in_batches(features, BATCH, run, lambda done, total: None)
    return np.stack(found, axis=1)


def _rows(task: Probabilities, data: str | Path | None, most: int) -> list[TaskRow]:
    return some(read_split(task, task.splits.test[0], data=data), most)
