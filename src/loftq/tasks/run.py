"""`loftq train --task`: from a model and a task to a run with what was trained and its scores.

The folder follows the rules of `train.run`: complete at every moment, and the same call goes on
with what was interrupted.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

from loftq.integrations.run_folder import RunFolder
from loftq.tasks.base import Task, TaskError
from loftq.tasks.config import BASELINES, Chosen, choose
from loftq.tasks.inputs import TaskInputs, read_task_inputs
from loftq.tasks.result import TaskResult, read_task_result
from loftq.tasks.session import TaskSession
from loftq.tasks.start import PackedStart, Start, baseline
from loftq.tasks.table import find_task
from loftq.train import resume
from loftq.train.base import backbone_folder, locate, own_tokenizer, require_calibration, settle
from loftq.train.config import missing_packages
from loftq.train.folder import begin, claimed, refuse_differences, refuse_others, refuse_own_output
from loftq.train.listener import Listener
from loftq.train.place import Place


def train_task(
    model: str | Path,
    task: str | Task,
    output: str | Path,
    *,
    data: str | Path | None = None,
    device: str | None = None,
    cache: str | Path | None = None,
    overwrite: bool = False,
    listener: Listener | None = None,
    **options: Any,
) -> TaskResult:
    """Fine-tune a model on a task and score it on the task's reported splits.

    Called again after an interruption it goes on from the last checkpoint; called again after its
    end with the same settings it returns at once.

    Args:
        model: output of `loftq.quantize`, run of `loftq.train`, or a full-precision model, which is
            quantized first and kept in `cache`.
        task: name of a row of TASKS, or a task of your own.
        output: folder of the run.
        data: folder laid out as LOFTQ_DATA (docs/tasks.md); None = LOFTQ_DATA, else the hub.
        device: "cpu" or "cuda"; None = the GPU if there is one.
        cache: folder for backbones that are made here.
        overwrite: replace what an earlier run left in `output`.
        listener: told how the run goes.
        **options: `method` (a method of quantization, or "full" and "lora16", which train the
            original model), fields of `TaskConfig`, `TrainConfig` and `QuantizeConfig`. What is not
            given is the task's default. `seed` is of the training.

    Returns:
        TaskResult: metrics with intervals, bytes, steps.

    Raises:
        TaskError: an unknown task, data or a model that cannot be used for it.
        TrainError: settings that cannot be carried out; see `loftq.train`.
        ValueError: anything wrong with the model or an option.
    """
    chosen_task = find_task(task) if isinstance(task, str) else task
    chosen = choose(chosen_task, options)
    _require(chosen, chosen_task)
    place, run = Place(device), RunFolder(Path(output))
    told = (listener or Listener()) if place.is_main else Listener()
    name = str(model)
    refuse_own_output(name, run)
    settings = chosen.settings(name, chosen_task, None if data is None else str(data))
    with claimed(run, place):
        if resume.is_finished(run) and not overwrite:
            refuse_differences(run, resume.differences(run, settings), finished=True)
            return read_task_result(run, already_finished=True)
        # The rows before the weights: quantizing takes long, and a bad row is soon found.
        inputs = read_task_inputs(
            chosen_task,
            backbone_folder(name),
            chosen.task,
            None if data is None else str(data),
            tokenizer=own_tokenizer(name),
        )
        start, checkpoint = _start(
            name, chosen, run, place, told, settings, cache=cache, device=device,
            overwrite=overwrite,
        )  # fmt: skip
        _record(run, place, settings, start, inputs, resumed=checkpoint is not None)
        session = TaskSession(
            run=run,
            start=start,
            inputs=inputs,
            chosen=chosen.task,
            config=chosen.config,
            place=place,
            listener=told,
            checkpoint=checkpoint,
        )
        session.carry_out()
        return read_task_result(run, resumed=session.first_step)


def _start(
    model: str,
    chosen: Chosen,
    run: RunFolder,
    place: Place,
    told: Listener,
    settings: dict[str, Any],
    *,
    cache: str | Path | None,
    device: str | None,
    overwrite: bool,
) -> tuple[Start, resume.Checkpoint | None]:
    """What training starts from, made now if need be, and the checkpoint to go on from.

    Whatever may be refused is refused before an earlier run is cleared away.
    """
    if chosen.method in BASELINES:
        return baseline(model, chosen), begin(run, place, settings, overwrite=overwrite)
    quantize = dict(chosen.quantize) | ({} if device is None else {"device": device})
    packed = (backbone_folder(model) / "loftq.json").is_file()
    if not packed:
        quantize["seed"] = chosen.task.quantize_seed
        if chosen.task.calibration is not None:
            quantize["data"] = chosen.task.calibration
        require_calibration(quantize)
    found = locate(model, quantize, cache=None if cache is None else Path(cache))
    checkpoint = begin(run, place, settings, overwrite=overwrite)
    with place.main_first():
        base = settle(found, quantize, told)
    return PackedStart(base=base), checkpoint


def _record(
    run: RunFolder,
    place: Place,
    settings: dict[str, Any],
    start: Start,
    inputs: TaskInputs,
    *,
    resumed: bool,
) -> None:
    """The records that say what this is, before anything takes time."""
    if resumed:
        refuse_others(run, digest=inputs.digest, backbone=start.base.backbone)
    if place.is_main:
        resume.write_record(run.config, settings)
        resume.write_record(run.path / "base.json", start.record())
        counts = inputs.shown(0).counts.to_dict()
        resume.write_record(run.data, {**counts, "digest": inputs.digest})


def _require(chosen: Chosen, task: Task) -> None:
    missing = missing_packages(chosen.config, importlib.util.find_spec)
    needed = ("datasets", *task.packages)
    missing += [name for name in needed if importlib.util.find_spec(name) is None]
    if missing:
        raise TaskError(
            f"{task.name}: needs {' and '.join(missing)}. pip install 'loftq[train,eval]' has what "
            "tasks need; an optimizer or a tracker is a package of its own."
        )
