"""docs/tasks.md says what the code does."""

import re
from dataclasses import fields
from pathlib import Path

from loftq.tasks import TASKS, Task
from loftq.tasks.config import NOT_HERE, TaskConfig

PAGE = (Path(__file__).parents[2] / "docs/tasks.md").read_text(encoding="utf-8")


def line(task: Task) -> str:
    found = task.defaults
    metrics = [task.primary, *(name for name in task.metric_names if name != task.primary)]
    batch = found["batch_size"] * found["gradient_accumulation"]
    return (
        f"| `{task.name}` | {', '.join(task.splits.test)} | {', '.join(metrics)} | "
        f"{found['epochs']} | {batch} | {found['learning_rate']} | {found['max_length']} |"
    )


def test_every_task_is_listed_with_its_settings() -> None:
    assert [line(task) for task in TASKS.values() if line(task) not in PAGE] == []
    assert len(
        re.findall(r"^\| `[\w-]+` \| [\w, ]+ \| [\w, ]+ \| \d+ \|", PAGE, re.MULTILINE)
    ) == len(TASKS)


def test_every_key_is_listed_with_its_default() -> None:
    section = PAGE.split("\n## Settings\n")[1].split("\n## ")[0]
    rows = dict(re.findall(r"^\| `(\w+)` \| (.*?) \|", section, re.MULTILINE))
    assert rows.keys() == {field.name for field in fields(TaskConfig)}
    for field in fields(TaskConfig):
        if field.default is not None:
            assert rows[field.name] == f"`{field.default}`", field.name
    assert all(f"`{name}`" in section for name in NOT_HERE)


def test_where_the_data_is_read_from_is_listed() -> None:
    for task in TASKS.values():
        assert task.local.partition("/")[0] in PAGE
        assert task.hub is None or task.hub.partition(":")[0] in PAGE
