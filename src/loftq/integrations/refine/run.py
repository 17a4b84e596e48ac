"""Carry out a refinement: its stages on a packed model with a trainable adapter."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from loftq.calibration import TokenWindows
from loftq.integrations.blocks import CheckpointBlocks
from loftq.integrations.refine.blocks import refine_blocks
from loftq.integrations.refine.natural import refine_natural
from loftq.integrations.refine.sitting import Listener, Sitting, Step
from loftq.integrations.refine.student import Student
from loftq.integrations.refine.whole import refine_whole
from loftq.refine import Refinement, Stage

if TYPE_CHECKING:
    from peft import PeftModel

__all__ = ["Listener", "Step", "refine_adapter"]

SCOPES: dict[str, Callable[[Stage, Student, Sitting], None]] = {
    "layer": refine_blocks,
    "block": refine_blocks,
    "model": refine_whole,
    "natural": refine_natural,
}


def refine_adapter(
    model: PeftModel,
    refinement: Refinement,
    windows: TokenWindows,
    open_original: Callable[[], CheckpointBlocks],
    *,
    state: Path,
    device: torch.device,
    seed: int = 0,
    listener: Listener = lambda step: None,
) -> list[dict[str, Any]]:
    """Refine the adapter of a packed model in place.

    Args:
        model: packed, in host memory, with its adapter trainable (`loftq.load`).
        refinement: the stages.
        windows: text; an eighth is held out of every descent.
        open_original: makes the full-precision model, streamed from its checkpoint.
        state: folder for what is finished; an interrupted refinement goes on from there, and ends
            where it would have ended.
        device: where to run.
        seed: of the order of batches.
        listener: progress.

    Returns:
        A row per stage, JSON-ready: its choices, and held-out losses of each unit before and after.

    Raises:
        ValueError: too little text, a loss that is not finite, or blocks that share weights.
    """
    student, rows = Student(model, device), []
    for number, stage in enumerate(refinement.stages):
        sitting = Sitting(
            folder=state,
            number=number,
            stages=len(refinement.stages),
            stage=stage,
            windows=windows,
            open_original=open_original,
            units=_units(stage, student),
            seed=seed,
            listener=listener,
        )
        SCOPES[stage.scope](stage, student, sitting)
        rows.append({**vars(stage), "units": sitting.rows})
    return rows


def _units(stage: Stage, student: Student) -> int:
    adapted = [student.adapted(block) for block in student.blocks]
    blocks = sum(map(bool, adapted))
    counts = {"layer": sum(map(len, adapted)), "block": blocks, "model": 1, "natural": blocks}
    return counts[stage.scope]
