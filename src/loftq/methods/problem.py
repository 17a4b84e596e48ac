"""The problem every method solves, and what may be known of the inputs of its layers."""

from __future__ import annotations

from dataclasses import dataclass, replace

from torch import Tensor

from loftq.formats import FormatSpec
from loftq.transforms import rotate_gram


@dataclass(frozen=True, kw_only=True)
class ProblemStatistics:
    """Statistics of the inputs of each weight of a stack, on the device of the weights."""

    mean_square: Tensor
    """E[x_i^2], (n, in_features) float64."""
    largest_mean: Tensor
    """Largest mean of |x_i| over a calibration window, (n, in_features) float64."""
    gram: Tensor | None
    """E[x x^T], (n, in_features, in_features) float32, or None where no method needs it."""
    tokens: tuple[int, ...]
    """Tokens counted, for each weight."""
    dropped: tuple[int, ...]
    """Tokens left out because an input was not finite, for each weight."""
    fisher_rows: Tensor | None = None
    """Row means of each weight's Fisher diagonal, (n, out_features) float64; None if not taken."""
    fisher_columns: Tensor | None = None
    """Column means of the same, (n, in_features) float64."""
    drift: Tensor | None = None
    """E[(x - x_hat) x_hat^T], (n, in_features, in_features) float32, where all the rest is of
    inputs x_hat that a model quantized so far reads in place of x; else None."""


@dataclass(frozen=True, kw_only=True)
class LayerProblem:
    """A stack of same-shape weights to write as Q + scaling * B A."""

    names: tuple[str, ...]
    """Module paths, for records and errors."""
    weights: Tensor
    """(n, out_features, in_features) float32."""
    spec: FormatSpec
    """Format of Q."""
    rank: int
    """Rank of B A."""
    scaling: float
    """The factor LoRA puts before B A: alpha / rank, or alpha / sqrt(rank) for rsLoRA."""
    scale_fit: str
    """Rule that chooses a group's scale (formats/grids.py)."""
    seeds: tuple[int, ...]
    """One per weight: everything random about it derives from its own seed."""
    statistics: ProblemStatistics | None = None
    """Of the inputs; None for methods that need none."""
    rival: FormatSpec | None = None
    """Another format of the same size, taken for each weight whose error is smaller in it."""
    strict: bool = False
    """Raise where a Gram needs more damping than was asked for, or tokens had to be dropped."""


def known_inputs(problem: LayerProblem) -> ProblemStatistics:
    """The statistics of a problem.

    Raises:
        ValueError: there are none.
    """
    if problem.statistics is None:
        raise ValueError(
            f"{problem.names[0]}: this method needs statistics of the layer's inputs. Give "
            "calibration text, or choose a method that needs none (loftq, qlora)."
        )
    return problem.statistics


def known_gram(problem: LayerProblem) -> Tensor:
    """E[x x^T] of a problem, (n, in_features, in_features)."""
    gram = known_inputs(problem).gram
    if gram is None:
        raise ValueError(f"{problem.names[0]}: this method needs the Gram, not its diagonal alone.")
    return gram


def in_stored_basis(problem: LayerProblem) -> LayerProblem:
    """What a rounding is told of a problem: the basis that the format stores weights in.

    The weights are those of the problem still; `Parts.rounding` turns what it rounds.
    """
    block, known = problem.spec.rotation, problem.statistics
    if not block:
        return problem
    if known is not None and known.gram is not None:
        known = replace(known, gram=rotate_gram(known.gram, block))
    return replace(problem, spec=replace(problem.spec, rotation=0), statistics=known)


def input_notes(problem: LayerProblem, i: int) -> tuple[str, ...]:
    """What a record has to say of the statistics of weight i; strict problems raise instead."""
    known = problem.statistics
    if known is None:
        return ()
    notes = []
    width = problem.weights.shape[-1]
    if known.dropped[i]:
        notes.append(f"{known.dropped[i]} calibration tokens left out: inputs not finite")
    if known.gram is not None and known.tokens[i] < width:
        notes.append(f"{known.tokens[i]} tokens for a Gram of {width}: damping fills the rest")
    if notes and problem.strict:
        raise ValueError(
            f"{problem.names[i]}: {'; '.join(notes)}. Calibrate on more, finite text, or set "
            "strict=false to go on with a note in the record."
        )
    return tuple(notes)
