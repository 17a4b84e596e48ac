"""What an output folder holds, and whether it is still what was written.

Everything is read back from the files and compared with the record of the run, `loftq.json`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from math import prod
from pathlib import Path
from typing import Any

from loftq.checkpoint import Checkpoint, CheckpointError, open_checkpoint
from loftq.report.output import AGAIN, InspectError, OutputFiles, RecordedLayer
from loftq.report.verify import (
    check_adapter,
    check_hashes,
    check_headers,
    check_scales,
    check_sizes,
    effective_error,
)

__all__ = ["RECORD_TOLERANCE", "InspectError", "InspectReport", "LayerRow", "inspect_output"]

RECORD_TOLERANCE = 1e-6
"""Largest relative difference between an error in the record and the one found in the files."""

OnStep = Callable[[int, int], object]
"""Called with (steps done, steps in all) while a folder is verified."""


@dataclass(frozen=True, kw_only=True)
class LayerRow:
    """One packed layer."""

    module: str
    format: str
    shape: tuple[int, int]
    bits_per_weight: float
    """Of the packed tensors in the files."""
    packed_bytes: int
    plain_error: float
    """Relative error of rounding alone, as recorded."""
    error: float
    """Relative error with the adapter, as recorded."""
    recomputed: float | None = None
    """The same from the files and the source, when a source was given."""

    @property
    def deviation(self) -> float:
        """Relative difference between the recorded and the recomputed error."""
        assert self.recomputed is not None
        return abs(self.recomputed - self.error) / (self.error or 1.0)


@dataclass
class InspectReport:
    """What was found; `problems` is empty for a folder in order."""

    folder: str
    model: dict[str, Any] = field(default_factory=dict)
    """Source, method, rank, alpha, backbone hash, versions."""
    bytes: dict[str, int] = field(default_factory=dict)
    """packed, unquantized, adapter, model (the three together), source, source_at_16_bits, disk
    (all files)."""
    bits_per_weight: float = 0.0
    mean_plain_error: float = 0.0
    mean_error: float = 0.0
    layers: tuple[LayerRow, ...] = ()
    checks: list[str] = field(default_factory=list)
    """What was verified, in words."""
    max_deviation: float | None = None
    """Largest relative difference between a recorded and a recomputed error."""
    problems: list[str] = field(default_factory=list)
    """Everything that is wrong: where, what was found, what to do."""

    @property
    def ok(self) -> bool:
        """Whether nothing is wrong."""
        return not self.problems

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready."""
        return {"ok": self.ok, **asdict(self)}


def inspect_output(
    folder: str | Path,
    check: bool = False,
    source: str | Path | None = None,
    *,
    on_step: OnStep | None = None,
) -> InspectReport:
    """Read an output folder of `quantize`; headers and records only, unless more is asked for.

    Args:
        folder: an output of `loftq quantize`.
        check: read every tensor: hashes, sizes, finite scales, backbone, adapter lineage.
        source: folder of the model it was made from: also recompute every layer's error from the
            files, with the function that made the record.
        on_step: progress.

    Returns:
        InspectReport; a damaged folder gives problems, not an exception.

    Raises:
        InspectError: no output of `loftq quantize` there, an unfinished one, or no record to
            compare with.
        ValueError: the source cannot be read.
    """
    report = InspectReport(folder=str(folder))
    origin = None if source is None else open_checkpoint(source)
    try:
        files = OutputFiles.open(Path(folder))
    except (CheckpointError, OSError) as error:
        report.problems.append(str(error))
        return report
    _describe(files, report)
    report.problems += check_headers(files)
    report.checks.append(f"names, shapes and dtypes of {len(files.record['tensors'])} tensors")
    if origin is not None:
        report.problems += _other_source(files, origin)
    if report.ok:
        _verify(files, report, check, origin, on_step)
    return report


def _describe(files: OutputFiles, report: InspectReport) -> None:
    record, config = files.record, files.record["config"]
    report.model = {
        "source": record["source"].get("name"),
        "method": config.get("method"),
        "rank": config.get("rank"),
        "ranks": sorted({layer["rank"] for layer in record["layers"] if layer["rank"]}),
        "alpha": config.get("alpha") or config.get("rank"),
        "scaling": record["scaling"],
        "adapter_required": files.config.get("adapter_required"),
        "backbone": record["backbone"],
        "loftq": record.get("loftq"),
        "torch": record.get("torch"),
        "device": record.get("device"),
    }
    report.layers = tuple(_row(files, layer) for layer in files.layers)
    packed = sum(row.packed_bytes for row in report.layers)
    stored = sum(entry.nbytes for entry in files.backbone.tensors.values())
    weights = sum(layer.weights for layer in files.layers)
    names = {name for layer in files.layers for name in layer.packed()}
    rest = sum(prod(e.shape) for name, e in files.backbone.tensors.items() if name not in names)
    adapter = sum(entry.nbytes for entry in files.adapter.tensors.values())
    report.bytes = {
        "packed": packed,
        "unquantized": stored - packed,
        "adapter": adapter,
        "model": stored + adapter,
        "source": record["totals"].get("source_bytes", 0),
        "source_at_16_bits": 2 * (weights + rest),
        "disk": sum(p.stat().st_size for p in files.folder.rglob("*") if p.is_file()),
    }
    count = max(1, len(files.layers))
    report.bits_per_weight = 8 * packed / max(1, weights)
    report.mean_plain_error = sum(row.plain_error for row in report.layers) / count
    report.mean_error = sum(row.error for row in report.layers) / count


def _row(files: OutputFiles, layer: RecordedLayer) -> LayerRow:
    entries = [files.backbone.tensors.get(name) for name in layer.packed()]
    size = sum(entry.nbytes for entry in entries if entry is not None)
    return LayerRow(
        module=layer.info.module,
        format=str(layer.spec),
        shape=layer.info.shape,
        bits_per_weight=8 * size / layer.weights,
        packed_bytes=size,
        plain_error=layer.record["plain_error"],
        error=layer.record["error"],
    )


def _other_source(files: OutputFiles, origin: Checkpoint) -> list[str]:
    recorded, found = files.record["source"].get("fingerprint"), origin.fingerprint()
    if recorded == found:
        return []
    return [
        f"{origin.folder}: not the model that {files.folder} was made from (fingerprint "
        f"{found[:12]}, recorded {str(recorded)[:12]} of {files.record['source'].get('name')}). "
        "Give that one with --source."
    ]


def _verify(
    files: OutputFiles,
    report: InspectReport,
    check: bool,
    origin: Checkpoint | None,
    on_step: OnStep | None,
) -> None:
    done, layers = 0, len(files.layers)
    tensors = len(files.record["tensors"])
    total = (tensors if check else 0) + (layers if origin is not None else 0)

    def step() -> None:
        nonlocal done
        done += 1
        if on_step is not None:
            on_step(done, total)

    if check:
        report.problems += check_hashes(files, step)
        report.problems += check_sizes(files, report.bytes)
        report.problems += check_scales(files)
        report.problems += check_adapter(files)
        report.checks += [
            f"sha256 of {tensors} tensors and of the backbone",
            f"packed bytes of {layers} layers, equal to bits_per_weight",
            "scales and offsets are finite",
            "the start adapter: lineage, rank, alpha, finite factors",
        ]
    if origin is not None:
        report.layers = tuple(_recomputed(files, report, origin, step))
        report.max_deviation = max((row.deviation for row in report.layers), default=0.0)
        report.problems += [_deviates(row) for row in report.layers if _is_off(row)]
        report.checks.append(f"error of {layers} layers from the files and {origin.folder}")


def _recomputed(
    files: OutputFiles, report: InspectReport, origin: Checkpoint, step: Callable[[], None]
) -> list[LayerRow]:
    rows = []
    for layer, row in zip(files.layers, report.layers, strict=True):
        rows.append(replace(row, recomputed=effective_error(layer, files, origin)))
        step()
    return rows


def _is_off(row: LayerRow) -> bool:
    return not row.deviation <= RECORD_TOLERANCE  # so that a NaN is off too


def _deviates(row: LayerRow) -> str:
    return (
        f"{row.module}: error {row.recomputed:.8g} from the files, {row.error:.8g} in the record "
        f"(relative difference {row.deviation:.1e}, allowed {RECORD_TOLERANCE:g}). {AGAIN}"
    )
