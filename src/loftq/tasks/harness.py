"""Everything else: our loaded model handed to lm-evaluation-harness (an optional package)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from loftq.tasks.base import TaskError

INSTALL = "pip install 'loftq[harness]'"


@dataclass(frozen=True, kw_only=True)
class HarnessResult:
    """What lm-evaluation-harness reports."""

    model: str
    adapter: str
    metrics: Mapping[str, Mapping[str, tuple[float, float | None]]]
    """Task -> metric -> (value, its standard error or None)."""
    shots: Mapping[str, int]
    """Task -> examples before each question."""
    version: str
    """Of lm-eval."""

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready."""
        return asdict(self)


def run_harness(
    path: str | Path,
    tasks: Sequence[str],
    *,
    limit: int | None = None,
    num_fewshot: int | None = None,
    batch_size: int = 8,
    include: str | Path | None = None,
    adapter: str | Path | None = None,
    device: str | None = None,
    dtype: str = "auto",
) -> HarnessResult:
    """Score a causal language model on tasks of lm-evaluation-harness.

    Args:
        path: RUN of train, OUT of quantize, or a full-precision model.
        tasks: names of its tasks or groups.
        limit: the first so many documents of each task; None = all.
        num_fewshot: examples before each question; None = the task's own.
        batch_size: requests at a time.
        include: folder with tasks of your own.
        adapter: see `integrations.causal.open_causal`.
        device: where to run; None = the GPU if there is one.
        dtype: to load the model in.

    Raises:
        TaskError: lm-eval is not installed, or it does not know a task.
        ValueError: no such model, or no causal language model.
    """
    if find_spec("lm_eval") is None:
        raise TaskError(f"`loftq eval harness` needs lm-eval: {INSTALL}.")
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    from loftq.integrations.causal import open_causal

    manager = TaskManager(include_path=None if include is None else str(include))
    unknown = [name for name in tasks if not manager.match_tasks([name])]
    if unknown or not tasks:
        raise TaskError(
            f"lm-eval {metadata.version('lm-eval')} knows no task {', '.join(unknown) or '(none)'}."
            " `lm_eval ls tasks` lists all; --include FOLDER adds your own."
        )
    opened = open_causal(path, adapter=adapter, device=device, dtype=dtype)
    model = HFLM(pretrained=opened.model, tokenizer=opened.tokenizer, batch_size=batch_size)
    found = simple_evaluate(
        model=model,
        tasks=list(tasks),
        num_fewshot=num_fewshot,
        limit=limit,
        task_manager=manager,
        log_samples=False,
        bootstrap_iters=1000,
    )
    return HarnessResult(
        model=str(path),
        adapter="none" if opened.adapter is None else opened.adapter.name,
        metrics={name: _scores(row) for name, row in found["results"].items()},
        shots=found["n-shot"],
        version=metadata.version("lm-eval"),
    )


def _scores(row: Mapping[str, Any]) -> dict[str, tuple[float, float | None]]:
    """metric -> (value, standard error) of a task's row, whose keys are METRIC,FILTER."""
    found = {}
    for key, value in row.items():
        metric, comma, kind = key.partition(",")
        if not comma or metric.endswith("_stderr") or not isinstance(value, int | float):
            continue
        error = row.get(f"{metric}_stderr,{kind}")
        name = metric if kind == "none" else f"{metric} ({kind})"
        found[name] = (float(value), float(error) if isinstance(error, int | float) else None)
    return found
