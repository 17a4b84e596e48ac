"""The memory that a run will take, and what would save most of it when it was not enough."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from loftq.train.config import TrainConfig
from loftq.train.errors import OutOfMemory

if TYPE_CHECKING:
    from pathlib import Path

    from loftq.train.memory.predict import TrainingSettings
    from loftq.train.memory.subject import Subject

SIDES = {"sft": 1, "preference": 2}
"""Sequences of a row: a preference has two, computed together."""


@dataclass(frozen=True, kw_only=True)
class Forecast:
    """Peak memory of a run, by part."""

    subject: Subject | None
    settings: TrainingSettings
    references: int
    """Adapters beside the trained one: the reference of preferences."""
    problem: str = ""
    """Why nothing can be said, or ""."""
    graphs: bool = False
    """Whether captured steps hold memory that is not in the parts."""
    without: frozenset[str] = frozenset()
    """Settings that this run cannot have, and is not advised to change."""

    @property
    def parts(self) -> Mapping[str, int]:
        """Bytes by part; those of nothing are left out, and all if the model is unknown."""
        return {} if self.subject is None else self._parts(self.subject, self.settings)

    def exhausted(self, step: int, rows: int, width: int) -> OutOfMemory:
        """The error of a batch of rows x width tokens that did not fit at `step`."""
        text = (
            f"step {step}: out of memory on a batch of {rows} x {width} = {rows * width:,} tokens"
        )
        if self.graphs:
            text += ", beside what captured steps hold (graphs=false frees it)"
        if self.subject is None or not rows * width:
            return OutOfMemory(f"{text}. Try a smaller batch_size or max_length. {self.problem}")
        from loftq.train.memory.savings import savings

        settings = replace(self.settings, batch_size=rows, length=width)
        parts = self._parts(self.subject, settings)
        shares = ", ".join(f"{name} {size / 1e9:.2f} GB" for name, size in parts.items())
        ways = [
            f"{found.change} saves {found.gigabytes:.2f} GB ({found.cost})"
            for found in savings(self.subject, settings, without=self.without)
        ]
        advice = f"; {' or '.join(ways)}" if ways else ""
        return OutOfMemory(
            f"{text}, which take {sum(parts.values()) / 1e9:.2f} GB by prediction ({shares})"
            f"{advice}. With another batch_size (and the same product with gradient_accumulation), "
            "checkpointing or what lies on the host the run goes on from its last checkpoint; "
            "other changes begin anew, with --overwrite or in another folder."
        )

    def _parts(self, subject: Subject, settings: TrainingSettings) -> dict[str, int]:
        from loftq.train.memory.predict import predict

        found = dict(predict(subject, settings).parts)
        found["reference"] = 4 * self.references * subject.adapter_parameters
        return {name: size for name, size in found.items() if size}


def forecast(
    folder: Path,
    config: TrainConfig,
    *,
    kind: str,
    longest: int,
    packing: bool,
    dtype: str,
    device: str,
    without: frozenset[str] = frozenset(),
) -> Forecast:
    """What the largest batch of a run takes.

    Args:
        folder: output of `quantize`.
        config: of the training.
        kind: of data, sft or preference.
        longest: tokens of the longest row.
        packing: whether the rows of a batch share one sequence.
        dtype: bf16, fp16 or fp32.
        device: cpu or cuda.
        without: settings that this kind of run does not take.
    """
    from loftq.train.memory.predict import TrainingSettings
    from loftq.train.memory.subject import UnknownModel, subject_of_output

    rows = config.batch_size * SIDES[kind]
    settings = TrainingSettings(
        batch_size=1 if packing else rows,
        length=longest * rows if packing else longest,
        accumulation=config.gradient_accumulation,
        dtype=dtype,
        checkpointing=config.checkpointing,
        fused=config.fused,
        optimizer=config.optimizer,
        embedding_on_host=config.host_embedding,
        offload=config.offload,
        keep_blocks=config.keep_blocks,
        padded=False if packing else None,
        device=device,
    )
    subject, problem = None, ""
    try:
        subject = subject_of_output(folder)
    except UnknownModel as error:
        packed = (folder / "loftq.json").is_file()
        problem = str(error) if packed else "Memory is predicted for packed models only."
    return Forecast(
        subject=subject,
        settings=settings,
        references=SIDES[kind] - 1,
        problem=problem,
        graphs=config.graphs,
        without=without | {"offload"} if config.graphs else without,
    )
