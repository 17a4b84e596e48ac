"""Whatever a user has of a task - a run, an ensemble, an output, a plain model - in its class."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from loftq.integrations.discover import load_config, load_tokenizer
from loftq.integrations.heads import Headed, attach_start, load_headed
from loftq.integrations.members import average_, load_members_, member_folders
from loftq.integrations.metrics import read_metrics
from loftq.integrations.peft import load_adapter
from loftq.integrations.run_folder import (
    START,
    RunFolder,
    backbone_and_adapter,
    open_run,
    tokenizer_home,
)
from loftq.integrations.source import resolve_source
from loftq.tasks.base import Task, TaskError
from loftq.tasks.table import TASKS


@dataclass(frozen=True)
class Opened:
    """A model ready to be scored."""

    model: nn.Module
    tokenizer: Any
    adapter: str
    """Name of its folder, "none", or how many members."""
    settings: Mapping[str, Any]
    """config.yaml of a run."""


def open_for_task(path: str | Path, task: Task, dtype: Any) -> Opened:
    """The model with whatever was trained, in the class of the task.

    Raises:
        TaskError: no head for the task, or a run that has not ended.
        ValueError: no such model.
    """
    here = Path(path).expanduser()
    runs = member_folders(here)
    if runs is not None:
        found = open_members(runs, task, dtype)
        average_(found.model, len(runs))
        return found
    if not (here / "base.json").is_file():
        return _open_model(resolve_source(path), str(path), task, dtype)
    run, settings = RunFolder(here), _settings(here)
    _refuse_other_head(here, task, settings)
    baseline = run.base().baseline
    if baseline == "full":
        folder = run.model
        if not (folder / "config.json").is_file():
            raise TaskError(f"{here}: the run has not ended. Give its `loftq train` command again.")
        headed, _ = headed_for(folder, task, dtype)
        return with_tokenizer(headed.model, folder, "none", settings)
    if baseline:
        folder, adapter = run.base().path, open_run(here).adapter
    else:
        folder, adapter = backbone_and_adapter(here)
    headed, _ = headed_for(folder, task, _trained_in(run) if dtype == "auto" else dtype)
    model = with_adapter(headed.model, adapter, packed=not baseline)
    return with_tokenizer(model, tokenizer_home(folder, adapter), adapter.name, settings)


def open_members(runs: Sequence[Path], task: Task, dtype: Any = "auto") -> Opened:
    """The members' adapters and heads on one backbone; the model takes the rows once for each.

    Raises:
        TaskError: a member of another task, or an ensemble of baselines.
        ValueError: members that cannot be computed together.
    """
    first, settings = RunFolder(runs[0]), _settings(runs[0])
    for run in runs:
        _refuse_other_head(run, task, _settings(run))
        if RunFolder(run).base().baseline:
            raise TaskError(f"{run}: a baseline; members of an ensemble share a packed backbone.")
    folder, adapter = backbone_and_adapter(runs[0])
    headed, _ = headed_for(folder, task, _trained_in(first) if dtype == "auto" else dtype)
    load_members_(headed.model, [open_run(run).adapter for run in runs])
    name = f"{len(runs)} members"
    found = with_tokenizer(headed.model, tokenizer_home(folder, adapter), name, settings)
    found.model.eval()
    return found


def _trained_in(run: RunFolder) -> str:
    """The dtype that a run computed and was scored in, so that its scores are found again."""
    names = {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32"}
    return names.get(str(read_metrics(run.metrics).summary.get("dtype")), "auto")


def _open_model(folder: Path, name: str, task: Task, dtype: Any) -> Opened:
    """A model that was not trained on the task; its own head must do."""
    headed, auto = headed_for(folder, task, dtype)
    if headed.new:
        raise TaskError(
            f"{name}: has no head for {task.name} ({headed.new[0]} and other weights are new). "
            f"Train it first: loftq train {name} --task {task.name} -o RUN, and score RUN."
        )
    start = folder / START
    if not (start / "adapter_config.json").is_file():
        return with_tokenizer(headed.model, folder, "none", {})
    model = attach_start(Headed(headed.model, (), ()), start, auto)
    return with_tokenizer(model, folder, START, {})


def headed_for(folder: Path, task: Task, dtype: Any) -> tuple[Headed, str]:
    """The model of `folder` in the class of the task, and the name of its Auto class."""
    auto = task.auto_class(load_config(folder))
    options = task.head_options()
    return load_headed(folder, auto, new_head=task.new_head, seed=0, dtype=dtype, **options), auto


def with_adapter(model: nn.Module, adapter: Path, *, packed: bool) -> nn.Module:
    """The model in PEFT; an adapter of a packed backbone is checked to be its own."""
    if packed:
        return load_adapter(model, adapter)
    from peft import PeftModel

    found: nn.Module = PeftModel.from_pretrained(model, str(adapter))
    return found


def with_tokenizer(model: Any, home: Path, adapter: str, settings: Mapping[str, Any]) -> Opened:
    """With the tokenizer of `home`, which gets a pad token where it has none."""
    tokenizer = load_tokenizer(home)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    model.config.pad_token_id = tokenizer.pad_token_id
    return Opened(model, tokenizer, adapter, settings)


def _settings(run: Path) -> dict[str, Any]:
    import yaml

    try:
        found = yaml.safe_load((run / "config.yaml").read_text(encoding="utf-8"))
    except (OSError, yaml.YAMLError) as error:
        raise TaskError(f"{run}/config.yaml: cannot be read ({error}). Restore it.") from error
    return found if isinstance(found, dict) else {}


def _refuse_other_head(run: Path, task: Task, settings: Mapping[str, Any]) -> None:
    """A head belongs to the task that it was trained for, or to one with the same classes."""
    if not task.new_head:
        return
    then = settings.get("task")
    known = TASKS.get(str(then))
    same = known is not None and (known.kind, known.head_options()) == (
        task.kind,
        task.head_options(),
    )
    if then != task.name and not same:
        trained = f"was trained on {then}" if then else "was not trained on a task"
        raise TaskError(
            f"{run}: {trained}, so it has no head for {task.name}. Train one: "
            f"loftq train MODEL --task {task.name} -o RUN."
        )
