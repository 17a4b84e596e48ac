"""All tasks by name. A new one is a file beside this and a row here."""

from __future__ import annotations

import difflib
from collections.abc import Mapping

from loftq.tasks.anli import ANLI
from loftq.tasks.base import Task, TaskError
from loftq.tasks.dream import DREAM
from loftq.tasks.glue import GLUE
from loftq.tasks.gsm8k import GSM8K, GSM8K_LOSS
from loftq.tasks.squad import SQUAD, XQUAD_EN
from loftq.tasks.summaries import CNN_DAILYMAIL, SCITLDR, XSUM
from loftq.tasks.wikitext import WIKITEXT2, WIKITEXT2_SMALL

TASKS: Mapping[str, Task] = {
    task.name: task
    for task in (
        *GLUE, ANLI, DREAM, SQUAD, XQUAD_EN, GSM8K, GSM8K_LOSS, WIKITEXT2, WIKITEXT2_SMALL, SCITLDR,
        XSUM, CNN_DAILYMAIL,
    )
}  # fmt: skip


def find_task(name: str) -> Task:
    """The task of this name.

    Raises:
        TaskError: there is none; names the nearest.
    """
    found = TASKS.get(name.lower())
    if found is not None:
        return found
    near = difflib.get_close_matches(name.lower(), TASKS, n=1, cutoff=0.4)
    hint = f"Did you mean {near[0]}? " if near else ""
    raise TaskError(f"no task {name!r}. {hint}There are {', '.join(TASKS)}.")
