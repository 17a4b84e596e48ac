"""Layer by layer or block by block, each learning from what the refined part before it gives.

Two models pass through their blocks side by side: the original one with inputs x, the packed one
with x_hat. Where both stand, F(x; W) is what the adapters of F at x_hat are aimed at. The device
holds one block of both and the hidden states of all tokens, of both models and of the target.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from loftq.integrations.refine.passage import Passage, first
from loftq.integrations.refine.sitting import Sitting
from loftq.integrations.refine.student import Student, pieces_of
from loftq.refine import Batches, Stage, Trajectory
from loftq.refine.rows import ERRORS

Call = Callable[[int], Tensor]
"""Number of a piece -> an output."""


def refine_blocks(stage: Stage, student: Student, sitting: Sitting) -> None:
    """Carry out a stage of scope layer or block; what an earlier process finished is taken over.

    Raises:
        ValueError: a model that enters its blocks several times, or too little text.
    """
    if student.reenters:
        raise ValueError(
            f"{type(student.module).__name__}: layers share their weights, so that no block comes "
            "after all before it were refined. Refine the model as a whole: refine=distill."
        )
    pieces, batches = pieces_of(sitting.windows.ids, sitting.windows.mask, stage.batch)
    masks = [mask.to(student.device) for _, mask in pieces]
    with Passage(sitting.open_original(), pieces) as original, Passage(student, pieces) as packed:
        while packed.at is not None:
            assert packed.at == original.at, "the packed model took another way"
            for unit in _units(stage, student, packed.at):
                if not sitting.take_over(unit, student.adapter(unit)):
                    found = _refine_unit(stage, unit, (original, packed), masks, batches, sitting)
                    sitting.settle(unit, student.adapter(unit), found)
            original.advance()
            packed.advance()


def _units(stage: Stage, student: Student, block: str) -> list[str]:
    layers = student.adapted(block)
    return layers if stage.scope == "layer" else [block] * bool(layers)


def _refine_unit(
    stage: Stage,
    unit: str,
    passages: tuple[Passage, Passage],
    masks: list[Tensor],
    batches: Batches,
    sitting: Sitting,
) -> Trajectory:
    original, packed = passages
    student = packed.model
    assert isinstance(student, Student)
    with torch.no_grad():
        wanted = _outputs(original, unit)
        call = packed.block if unit == packed.at else _layer(packed, unit)
    error = ERRORS[stage.error]

    def loss(number: int) -> Tensor:
        with student.autocast():
            found = call(number)
        return error(found, wanted[number], masks[number])

    return sitting.descend(list(student.adapter(unit).values()), loss, batches)


def _outputs(passage: Passage, unit: str) -> list[Tensor]:
    """What a block, or a layer in it, gives for each piece."""
    numbers = range(len(passage.pieces))
    if unit == passage.at:
        return [passage.block(number) for number in numbers]
    return [_inside(passage, unit, number)[1] for number in numbers]


def _layer(passage: Passage, unit: str) -> Call:
    """A layer on the inputs that it reads now."""
    module = passage.model.module.get_submodule(unit)
    inputs = [_inside(passage, unit, number)[0] for number in range(len(passage.pieces))]
    return lambda number: first(module(inputs[number]))


def _inside(passage: Passage, unit: str, number: int) -> tuple[Tensor, Tensor]:
    """Input and output of a layer when the block is called for a piece."""
    with _listening(passage, unit) as seen:
        passage.block(number)
    tokens = passage.pieces[number][1].numel()
    # DeBERTa sends a table of relative positions through the same layers, after the tokens.
    return next(pair for pair in seen if pair[0].shape[:-1].numel() == tokens)


@contextmanager
def _listening(passage: Passage, unit: str) -> Iterator[list[tuple[Tensor, Tensor]]]:
    seen: list[tuple[Tensor, Tensor]] = []
    handle = passage.model.module.get_submodule(unit).register_forward_hook(
        lambda module, args, output: seen.append((args[0].detach(), first(output).detach()))
    )
    try:
        yield seen
    finally:
        handle.remove()
