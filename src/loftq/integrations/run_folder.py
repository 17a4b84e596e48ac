"""The folder of a `loftq train` run, and the backbone that it points at."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from loftq.integrations.peft import check_lineage

START = "init_adapter"


class RunError(ValueError):
    """The folder is not a run, or its backbone is not where it points."""


@dataclass(frozen=True, kw_only=True)
class RunBase:
    """base.json: what a run was trained on."""

    path: Path
    """The output of `quantize`; relative paths are resolved against the run."""
    backbone: str
    """sha256 of its packed tensors, as in loftq.json."""
    model: str
    """The model as the user named it."""
    baseline: str = ""
    """full or lora16 where the original model was trained instead of a packed one."""


@dataclass(frozen=True)
class RunFolder:
    """Where the files of a run are; none of them need exist."""

    path: Path

    @property
    def adapter(self) -> Path:
        """The trained adapter, a standard PEFT folder."""
        return self.path / "adapter"

    @property
    def model(self) -> Path:
        """The trained model of a run that trained every weight, in place of an adapter."""
        return self.path / "model"

    @property
    def config(self) -> Path:
        """Resolved configuration, YAML."""
        return self.path / "config.yaml"

    @property
    def metrics(self) -> Path:
        """One JSON object a line: steps, validations, the summary."""
        return self.path / "metrics.jsonl"

    @property
    def samples(self) -> Path:
        """Held-out prompts before and after."""
        return self.path / "samples.json"

    @property
    def task(self) -> Path:
        """Scores of a run on a published task; not in other runs."""
        return self.path / "task.json"

    @property
    def data(self) -> Path:
        """Counts of the training data."""
        return self.path / "data.json"

    @property
    def memory(self) -> Path:
        """Predicted bytes by part, measured peak."""
        return self.path / "memory.json"

    @property
    def checkpoints(self) -> Path:
        """Checkpoints of the trainer."""
        return self.path / "checkpoints"

    @property
    def report(self) -> Path:
        """The page."""
        return self.path / "report.html"

    def base(self) -> RunBase:
        """What the run was trained on.

        Raises:
            RunError: base.json is missing or damaged.
        """
        file = self.path / "base.json"
        try:
            found = json.loads(file.read_text(encoding="utf-8"))
            return RunBase(
                path=self.path / found["path"],  # an absolute path stays what it is
                backbone=str(found["backbone"]),
                model=str(found["model"]),
                baseline=str(found.get("baseline", "")),
            )
        except FileNotFoundError:
            raise RunError(
                f"{self.path}: no base.json, so not a run of `loftq train`. Give the folder that "
                "train wrote with -o."
            ) from None
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise RunError(f"{file}: cannot be read ({error!r}). Restore it.") from error


def open_run(path: str | Path) -> RunFolder:
    """A run with a trained adapter, or a trained model where every weight was trained.

    Raises:
        RunError: no run, or one that ended before its adapter was written.
    """
    run = RunFolder(Path(path))
    whole = run.base().baseline == "full" and (run.model / "config.json").is_file()
    if not whole and not (run.adapter / "adapter_config.json").is_file():
        raise RunError(
            f"{run.path}: no adapter/adapter_config.json, so the run has not ended. Give its "
            "`loftq train` command again: it goes on from the last checkpoint."
        )
    return run


def tokenizer_home(folder: Path, adapter: Path | None) -> Path:
    """The folder whose tokenizer counts: the adapter's, with the chat template that it was trained
    with, if it brings one, else that of the model in `folder`."""
    saved = adapter is not None and (adapter / "tokenizer_config.json").is_file()
    return adapter if adapter is not None and saved else folder


def backbone_and_adapter(path: str | Path) -> tuple[Path, Path]:
    """(OUT, adapter) of a run, or of an output of `quantize` with its start adapter.

    Raises:
        RunError: neither of the two, or the backbone of a run is gone.
        LineageError: the adapter belongs to another backbone.
    """
    folder = Path(path)
    if (folder / "loftq.json").is_file():
        out, adapter = folder, folder / START
    else:
        run = RunFolder(folder)
        base = run.base()
        if base.baseline:
            raise RunError(
                f"{folder}: a baseline ({base.baseline}) on the full-precision model {base.model}, "
                "without a packed backbone. `loftq eval` with its task scores it."
            )
        out, adapter = base.path, open_run(folder).adapter
    try:
        backbone = json.loads((out / "loftq.json").read_text(encoding="utf-8"))["backbone"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise RunError(
            f"{out}: the backbone of {folder} cannot be read ({error!r}). Put it back, or correct "
            "the path in base.json."
        ) from error
    check_lineage(adapter, backbone)
    return out, adapter
