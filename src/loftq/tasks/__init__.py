"""Tasks: published data sets with their heads, metrics and settings, to train on and to score.

    table.py    every task by name          kinds/     rows -> features -> predictions -> scores
    sources.py  files or hub -> rows        run.py     train on a task      scoring.py   score one

Importing this room imports no torch.
"""

from __future__ import annotations

from typing import Any

from loftq.tasks.base import Reading, Splits, Task, TaskError, TaskRow
from loftq.tasks.scores import Score
from loftq.tasks.table import TASKS, find_task

__all__ = [
    "TASKS",
    "Evaluation",
    "Reading",
    "Score",
    "Splits",
    "Task",
    "TaskError",
    "TaskResult",
    "TaskRow",
    "evaluate",
    "find_task",
    "load_task_model",
    "score_model",
    "train_task",
]

_LAZY = {
    "Evaluation": "loftq.tasks.scoring",
    "TaskResult": "loftq.tasks.result",
    "evaluate": "loftq.tasks.scoring",
    "load_task_model": "loftq.tasks.scoring",
    "score_model": "loftq.tasks.scoring",
    "train_task": "loftq.tasks.run",
}


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(_LAZY[name]), name)
