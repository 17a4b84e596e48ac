"""Going on with an interrupted run: the same settings, and the last checkpoint that is whole."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from loftq.checkpoint.durable import explained, publish, write_partial
from loftq.integrations.metrics import read_metrics
from loftq.integrations.run_folder import RunFolder
from loftq.train.errors import TrainError

NEEDED = ("optimizer.pt", "scheduler.pt")
WEIGHTS = (
    ("adapter_config.json", "adapter_model.safetensors"),
    ("config.json", "model.safetensors"),
    ("config.json", "model.safetensors.index.json"),
)
"""What a checkpoint of an adapter holds, or one of a whole model."""
LOCK = ".loftq-lock"  # while a process works in the folder
STATE = "trainer_state.json"  # the last file of a checkpoint that is written
FREE = (
    "batch_size", "gradient_accumulation", "checkpointing", "keep_blocks", "fused", "graphs",
    "offload", "host_embedding", "report_to", "keep_checkpoints", "samples", "sample_tokens",
)  # fmt: skip
"""Settings that leave the result alone; of the first two the product counts."""
OURS = (
    "adapter", "adapter.partial", "config.yaml", "metrics.jsonl", "checkpoints", "base.json",
    "samples.json", "data.json", "memory.json", "report.html", "model", "model.partial",
    "task.json", "predictions-*.jsonl",
)  # fmt: skip
"""What `train` writes into its folder, and so may remove; patterns."""


@dataclass(frozen=True)
class Checkpoint:
    """A complete checkpoint of the trainer."""

    path: Path
    step: int


def write_record(path: Path, value: Mapping[str, Any] | Sequence[Any]) -> None:
    """Write JSON (or YAML, by the name's end) so that it appears whole or not at all."""
    if path.suffix == ".yaml":
        text = yaml.safe_dump(value, sort_keys=False, allow_unicode=True)
    else:
        text = json.dumps(value, indent=2, ensure_ascii=False) + "\n"
    write_partial(path, text.encode())
    publish(path)


def is_finished(run: RunFolder) -> bool:
    """Whether the run in this folder came to its end."""
    return any(
        (folder / name).is_file()
        for folder, name in ((run.adapter, "adapter_config.json"), (run.model, "config.json"))
    )


def differences(run: RunFolder, settings: Mapping[str, Any]) -> list[str]:
    """Settings of the run in this folder that are others now, as readable words."""
    try:
        found = yaml.safe_load(run.config.read_text(encoding="utf-8"))
    except (OSError, yaml.YAMLError):
        found = None
    if not isinstance(found, dict):
        return ["config.yaml cannot be read"]
    then, now = _essence(found), _essence(json.loads(json.dumps(settings)))
    return [
        f"{key}: {then.get(key)!r} then, {now.get(key)!r} now"
        for key in sorted(then.keys() | now.keys())
        if then.get(key) != now.get(key)
    ]


def _essence(settings: Mapping[str, Any]) -> dict[str, Any]:
    kept = {key: value for key, value in settings.items() if key not in FREE}
    batch = settings.get("batch_size", 0) * settings.get("gradient_accumulation", 0)
    return {**kept, "rows in a step": batch}


def last_checkpoint(run: RunFolder) -> Checkpoint | None:
    """The newest whole checkpoint; what a kill left half-written is removed."""
    whole = []
    for path in run.checkpoints.glob("checkpoint-*"):
        if re.fullmatch(r"checkpoint-\d+", path.name) is None or not path.is_dir():
            continue
        step = int(path.name.partition("-")[2])
        if _is_whole(path, step):
            whole.append(Checkpoint(path, step))
        else:
            shutil.rmtree(path)
    return max(whole, key=lambda found: found.step, default=None)


def _is_whole(path: Path, step: int) -> bool:
    try:
        state = json.loads((path / STATE).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    random = any(path.glob("rng_state*.pth"))
    complete = all((path / name).is_file() for name in NEEDED)
    weights = any(all((path / name).is_file() for name in names) for names in WEIGHTS)
    return bool(complete and weights and random and state.get("global_step") == step)


def refuse_foreign(run: RunFolder) -> None:
    """Leave a folder alone that holds files and no run.

    Raises:
        TrainError: it does, or it is a file.
    """
    if run.path.is_file():
        raise TrainError(f"{run.path}: a file. Choose a folder with -o.")
    names = {path.name for path in run.path.iterdir()} if run.path.exists() else set()
    foreign = {name for name in names if name != LOCK and not name.endswith(".partial")}
    if foreign and not run.config.is_file():
        raise TrainError(
            f"{run.path}: holds files and no run of `loftq train`, so it will not be written to. "
            "Choose another folder with -o."
        )


def clear(run: RunFolder) -> None:
    """Remove what an earlier run left in its folder, and nothing else."""
    for path in [path for name in OURS for path in run.path.glob(name)]:
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)


def check_space(run: RunFolder, trainable: int, state_bytes: float, keep: int) -> None:
    """Refuse to begin if the checkpoints would not fit on the disk.

    Args:
        run: where they go.
        trainable: adapter parameters, float32.
        state_bytes: of the optimizer for each of them.
        keep: checkpoints that stay.

    Raises:
        CheckpointError: saying what is needed and what is free.
    """
    one = round(trainable * (4 + state_bytes)) + 2**20  # and small files
    there = sum(f.stat().st_size for f in run.checkpoints.rglob("*") if f.is_file())
    needed = (keep + 1) * one + 4 * trainable - there  # a new one is whole before an old one goes
    with explained(run.path, needed):
        from loftq.checkpoint.durable import check_space as check

        check(run.path, needed)


def rewind_metrics(run: RunFolder, step: int) -> float:
    """Drop the rows of metrics.jsonl after `step`; returns the seconds trained up to it."""
    if not run.metrics.is_file():
        return 0.0
    found = read_metrics(run.metrics)
    rows = [row for row in (*found.train, *found.validation) if row["step"] <= step]
    rows.sort(key=lambda row: (row["step"], "validation_loss" in row))
    write_partial(run.metrics, "".join(json.dumps(row) + "\n" for row in rows).encode())
    publish(run.metrics)
    return max((float(row.get("seconds", 0.0)) for row in rows), default=0.0)
