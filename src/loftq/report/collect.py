"""Everything that a report page shows, read from an output of `quantize` or a run of `train`.

Plain data, nothing drawn. What is not there is listed in `missing`: the page says it.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from loftq.integrations.metrics import Metrics, loss_unit, read_metrics
from loftq.integrations.run_folder import RunFolder, open_run
from loftq.report.grid import ErrorGrid, error_grid
from loftq.report.inspect import InspectReport, inspect_output
from loftq.report.output import InspectError, OutputFiles
from loftq.report.spectra import (
    SourceMissing,
    Spectrum,
    origin_of,
    residual_spectra,
    typical_layers,
)

BASE = "base.json"


@dataclass(frozen=True, kw_only=True)
class Backbone:
    """An output of `quantize`."""

    report: InspectReport
    config: Mapping[str, Any]
    """Resolved configuration of the quantization."""
    grid: ErrorGrid
    notes: tuple[tuple[str, str], ...]
    """(module, what did not go the plain way)."""
    kept: tuple[Mapping[str, Any], ...]
    """Weights that stay unquantized: module, parameters, reason."""
    spectra: tuple[Spectrum, ...]
    no_spectra: str
    """Why there are none, or ""."""


@dataclass(frozen=True, kw_only=True)
class Training:
    """A run of `train`."""

    config: Mapping[str, Any]
    metrics: Metrics
    samples: tuple[Mapping[str, Any], ...]
    """prompt, reference, before, after."""
    data: Mapping[str, Any]
    memory: Mapping[str, int]
    """Predicted bytes at the peak, by part."""
    measured_peak: int | None
    task: Mapping[str, Any]
    """task.json: scores of a run on a published task; empty for other runs."""

    @property
    def loss_unit(self) -> str:
        """What the losses count."""
        return loss_unit(self.data)


@dataclass(frozen=True, kw_only=True)
class Facts:
    """What a page is made of."""

    folder: Path
    backbone_folder: Path
    model: str
    """The model as the user named it."""
    backbone: Backbone | None
    training: Training | None
    missing: tuple[str, ...]
    """What the page cannot show, and why."""


def collect(folder: str | Path, *, source: str | None = None, layers: Sequence[str] = ()) -> Facts:
    """Read an output of `loftq quantize` or a run of `loftq train`.

    Args:
        folder: OUT or RUN.
        source: the model that OUT was made from, for the singular values; None = where OUT says.
        layers: modules whose singular values are computed; empty = the layers with the largest,
            the middle and the smallest error.

    Raises:
        ValueError: neither of the two, an unfinished output, or an unknown layer.
    """
    path, missing = Path(folder), []
    if not (path / BASE).is_file():
        if (path / "config.yaml").is_file() and not (path / "loftq.json").is_file():
            open_run(path)  # says which of its files a run lacks
        backbone = _backbone(path, source, layers)
        model = str(backbone.report.model["source"])
        return Facts(folder=path, backbone_folder=path, model=model, backbone=backbone,
                     training=None, missing=())  # fmt: skip
    run = open_run(path)
    base = run.base()
    found: Backbone | None = None
    try:
        found = _backbone(base.path, source, layers)
    except (InspectError, OSError) as error:
        missing.append(f"Everything about the backbone: {error}")
    training = _training(run, missing)
    return Facts(folder=path, backbone_folder=base.path, model=base.model, backbone=found,
                 training=training, missing=tuple(missing))  # fmt: skip


def _backbone(folder: Path, source: str | None, layers: Sequence[str]) -> Backbone:
    report = inspect_output(folder)
    if not report.layers:  # damaged: there is nothing to draw
        raise InspectError("; ".join(report.problems))
    files = OutputFiles.open(folder)
    spectra: tuple[Spectrum, ...] = ()
    problem = "the files of the output are damaged" if report.problems else ""
    if not problem:
        try:
            chosen = layers or typical_layers(files)
            spectra = residual_spectra(files, origin_of(files, source), chosen)
        except SourceMissing as error:
            problem = str(error)
    record = files.record
    return Backbone(
        report=report,
        config=record["config"],
        grid=error_grid(report.layers),
        notes=tuple((x["name"], note) for x in record["layers"] for note in x.get("notes", ())),
        kept=tuple(record.get("kept", ())),
        spectra=spectra,
        no_spectra=problem,
    )


def _training(run: RunFolder, missing: list[str]) -> Training:
    metrics = read_metrics(run.metrics) if run.metrics.is_file() else Metrics()
    if not metrics.train:
        missing.append("Loss curves: metrics.jsonl holds no step.")
    if metrics.unreadable:
        missing.append(f"{metrics.unreadable} unreadable line(s) of metrics.jsonl.")
    memory = _json(run.memory, missing, "Memory by part", {})
    config: Mapping[str, Any] = {}
    if run.config.is_file():
        config = yaml.safe_load(run.config.read_text(encoding="utf-8")) or {}
    return Training(
        config=config,
        metrics=metrics,
        samples=_samples(_json(run.samples, missing, "Samples", [])),
        data=_json(run.data, missing, "Counts of the data", {}),
        memory={name: int(size) for name, size in (memory.get("predicted") or {}).items()},
        measured_peak=memory.get("measured_peak"),
        task=_task(run),
    )


def _task(run: RunFolder) -> Mapping[str, Any]:
    return _json(run.task, [], "", {}) if run.task.is_file() else {}


def _samples(found: Sequence[Any]) -> tuple[dict[str, str | None], ...]:
    keys = ("prompt", "reference", "before", "after")
    return tuple({key: row.get(key) for key in keys} for row in found if isinstance(row, dict))


def _json(path: Path, missing: list[str], what: str, empty: Any) -> Any:
    """The JSON in a file of a run; `empty`, and a line in `missing`, if it cannot be read."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        missing.append(f"{what}: {path.name} is not in the run.")
        return empty
    except (OSError, ValueError) as error:
        missing.append(f"{what}: {path.name} cannot be read ({error}).")
        return empty
    if isinstance(value, type(empty)):
        return value
    missing.append(f"{what}: {path.name} holds something else.")
    return empty
