"""Two solutions of one problem, in two formats of equal size: for each weight the better one."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from loftq.methods.base import LayerRecord, LayerSolution


def better_of(first: LayerSolution, second: LayerSolution) -> LayerSolution:
    """Weight by weight the solution with the smaller error, the first where they are equal.

    Args:
        first: of a method on a problem.
        second: of the same method and problem, but for the format.
    """
    pairs = list(zip(first.records, second.records, strict=True))
    turn = [left_over(b) < left_over(a) for a, b in pairs]
    chosen = torch.tensor(turn, device=first.lora_A.device)[:, None, None]
    both = zip(turn, first.quantized, second.quantized, strict=True)
    return replace(
        first,
        quantized=tuple(b if other else a for other, a, b in both),
        lora_A=torch.where(chosen, second.lora_A, first.lora_A),
        lora_B=torch.where(chosen, second.lora_B, first.lora_B),
        records=tuple(
            _told(b, a) if other else _told(a, b) for other, (a, b) in zip(turn, pairs, strict=True)
        ),
    )


def left_over(record: LayerRecord) -> float:
    """The error that a choice goes by: in the method's metric and of its target.

    Without a step of the schedule, that of the outputs, or of the weights where no input is known.
    """
    if record.kept:
        return record.errors[record.kept - 1]
    return record.error if record.output_error is None else record.output_error


def _told(kept: LayerRecord, other: LayerRecord) -> LayerRecord:
    return replace(kept, rival=other.format, rival_error=left_over(other))
