"""One function for every target: choose, refuse, write, compare, tell how to serve."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from loftq import __version__
from loftq.checkpoint.export import Layout, cannot_read, first_obstacle
from loftq.integrations.export.card import export_card
from loftq.integrations.export.job import Job, Step, as_json
from loftq.integrations.export.serve import Serve
from loftq.integrations.export.source import ExportError, ExportSource, open_source
from loftq.integrations.export.stage import RECORD, staged
from loftq.integrations.export.targets import ENGINES, EXPORTS, Export
from loftq.pipeline.serving import architecture_obstacle

ANYWAY = (
    "or serve what any format allows: --to lora (the training as an adapter for the original "
    "model) or --to dense (merged, 16 bits)"
)


@dataclass(frozen=True, kw_only=True)
class Exported:
    """What was written and how to use it."""

    target: str
    """Name of the export: bnb, gptq, compressed-tensors, gguf, lora or dense."""
    engine: str | None
    """The engine asked for, if one was."""
    folder: Path
    files: Mapping[str, int]
    """Path in the folder -> bytes."""
    serve: tuple[Serve, ...]
    """Commands, the engine asked for first."""
    limits: tuple[str, ...]
    compared: int
    """Tensors that were read back and found equal to the source, bit by bit."""
    seconds: float

    @property
    def serve_command(self) -> str:
        """The first command; "" where no engine serves this adapter beside its base."""
        return self.serve[0].command if self.serve else ""

    @property
    def nbytes(self) -> int:
        """Of all files."""
        return sum(self.files.values())

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready."""
        return {
            "target": self.target,
            "engine": self.engine,
            "folder": str(self.folder),
            "files": dict(self.files),
            "serve": [place.to_dict() for place in self.serve],
            "limits": list(self.limits),
            "compared": self.compared,
            "seconds": self.seconds,
        }


def export(
    path: str | Path,
    *,
    output: str | Path,
    to: str | None = None,
    engine: str | None = None,
    adapter: str | Path | None = None,
    overwrite: bool = False,
    on_step: Step | None = None,
    **options: Any,
) -> Exported:
    """Lay a packed model out for another engine, without rounding it again.

    Streams tensor by tensor; the folder appears under its name once everything in it was read back
    and compared with the source. After an interruption the same call goes on.

    Args:
        path: an OUT of quantize or a RUN of train.
        output: the folder to make.
        to: target, a key of `EXPORTS`; or else
        engine: transformers, vllm or llama.cpp: the first of its targets that holds every layer.
        adapter: another adapter of the same backbone than the RUN's (or the start).
        overwrite: replace an earlier export.
        on_step: progress, called with tensors done and in all.
        **options: of some targets: `base` (lora: name or folder of the original model), `dtype`
            (dense), `vocab` (gguf: a GGUF file with the tokenizer), `max_shard_bytes`.

    Raises:
        ExportError: the target cannot hold a layer (the first is named, with the format to choose),
            an unusable folder, or a difference found by the comparison.
        LineageError: the adapter belongs to another backbone.
        ValueError: neither or both of `to` and `engine`, or unknown names.
    """
    begin = time.perf_counter()
    wanted = _targets(to, engine)
    source = open_source(path, adapter=adapter)
    row = _choose(source, wanted, engine)
    given = {key: value for key, value in options.items() if value is not None}
    _check_options(row, given)
    output = Path(output)
    identity = {
        "to": row.name, "source": source.fingerprint(), "output": str(output),
        "loftq": __version__, **{key: str(value) for key, value in given.items()},
    }  # fmt: skip
    with staged(output, identity, overwrite=overwrite) as folder:
        job = Job(
            source=source,
            folder=folder,
            output=output,
            options=given,
            step=on_step or (lambda done, total: None),
        )
        compared = row.write(job)
        places, limits = _ordered(row.commands(job), engine), tuple(row.limits(job))
        record = _record(job, row, places, limits, compared)
        (folder / "README.md").write_text(export_card(job, row.name, row.summary, places, limits))
        (folder / RECORD).write_bytes(as_json(record))
    return Exported(
        target=row.name,
        engine=engine,
        folder=output,
        files=_files(output),
        serve=places,
        limits=limits,
        compared=compared,
        seconds=time.perf_counter() - begin,
    )


def _targets(to: str | None, engine: str | None) -> tuple[str, ...]:
    if (to is None) == (engine is None):
        raise ValueError(
            f"give either --to ({', '.join(EXPORTS)}) or --for ({', '.join(ENGINES)}), one of them."
        )
    if to is not None and to not in EXPORTS:
        raise ValueError(f"to={to!r} does not exist; choose one of {', '.join(EXPORTS)}.")
    if engine is not None and engine not in ENGINES:
        raise ValueError(f"engine={engine!r} does not exist; choose one of {', '.join(ENGINES)}.")
    return (to,) if to is not None else ENGINES[str(engine)]


def _choose(source: ExportSource, wanted: tuple[str, ...], engine: str | None) -> Export:
    """The first target that holds every layer.

    Raises:
        ExportError: none does; says why for each, and what to quantize with instead.
    """
    problems = {}
    for name in wanted:
        layout = EXPORTS[name].layout
        problem = "" if layout is None else _problem(source, layout, engine)
        if not problem:
            return EXPORTS[name]
        problems[name] = problem
    raise ExportError(_refusal(source, problems, engine))


def _problem(source: ExportSource, layout: Layout, engine: str | None) -> str:
    found = obstacle(source, layout)
    if found:
        return f"{layout.name} cannot hold it: {found}."
    asked = layout.readers if engine is None else (engine,)
    unread = [cannot_read(one, layout, source.weights, source.kept) for one in asked]
    return f"{layout.name} holds it, but {', and '.join(unread)}." if all(unread) else ""


def _refusal(source: ExportSource, problems: Mapping[str, str], engine: str | None) -> str:
    advice = f"--for {engine}"
    if engine is None:
        layout = EXPORTS[next(iter(problems))].layout
        assert layout is not None
        advice = layout.advice
    as_it_is = "run it as it is (import loftq; loftq.load), " if engine == "transformers" else ""
    return "\n".join(
        [
            f"{source.folder}: rounding it again for an export would make its adapter wrong.",
            *problems.values(),
            f"Quantize {source.model} again with {advice}, {as_it_is}{ANYWAY}.",
        ]
    )


def readers(path: str | Path) -> tuple[str, ...]:
    """Engines that can hold the model at `path` without loss, as --for names them.

    Args:
        path: an OUT of quantize or a RUN of train; headers and records are read.
    """
    source = open_source(path)
    return tuple(
        engine
        for engine, targets in ENGINES.items()
        if any(
            layout is not None and not _problem(source, layout, engine)
            for layout in (EXPORTS[name].layout for name in targets)
        )
    )


def obstacle(source: ExportSource, layout: Layout) -> str:
    """Why a layout cannot hold the model; "" if it can."""
    found = architecture_obstacle(layout, source.architecture)
    return found or first_obstacle(layout, source.weights)


def _check_options(row: Export, given: Mapping[str, Any]) -> None:
    for key in given:
        if key not in row.options:
            takers = [other.name for other in EXPORTS.values() if key in other.options]
            where = f"an option of --to {', '.join(takers)}" if takers else "unknown"
            known = f" It takes {', '.join(row.options)}." if row.options else ""
            raise ValueError(f"{key}: {where}, not of --to {row.name}.{known}")


def _ordered(places: tuple[Serve, ...], engine: str | None) -> tuple[Serve, ...]:
    return tuple(sorted(places, key=lambda place: place.engine != engine))


def _record(
    job: Job, row: Export, places: tuple[Serve, ...], limits: tuple[str, ...], compared: int
) -> dict[str, Any]:
    source = job.source
    return {
        "version": 1,
        "loftq": __version__,
        "to": row.name,
        "model": source.model,
        "backbone": source.record["backbone"],
        "adapter": {"sha256": source.adapter.sha256(), "trained": source.trained,
                    "rank": source.adapter.rank, "scaling": source.adapter.scaling},
        "options": {key: str(value) for key, value in job.options.items()},
        "serve": [place.to_dict() for place in places],
        "limits": list(limits),
        "compared": compared,
    }  # fmt: skip


def _files(folder: Path) -> dict[str, int]:
    paths = sorted(path for path in folder.rglob("*") if path.is_file())
    return {path.relative_to(folder).as_posix(): path.stat().st_size for path in paths}
