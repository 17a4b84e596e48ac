"""The parts that a row of the method table is put together from, by name.

A new metric or rounding is an entry here; neither methods nor the pipeline ask for names.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from loftq.lowrank import CholeskyRoot, DiagonalRoot, Metric
from loftq.methods.problem import LayerProblem, ProblemStatistics
from loftq.rounding import DescentGptq, Gptq, Rounded, round_to_nearest

NEEDS = ("none", "diagonal", "gram")
"""Statistics of the inputs, in rising order: whoever has a Gram has the diagonal."""

Quantize = Callable[[Tensor], tuple[Rounded, Tensor]]


@dataclass(frozen=True)
class MetricPart:
    """A way to weigh errors."""

    needs: str
    make: Callable[[LayerProblem, float], Metric]
    """(problem, damping) -> metric."""


@dataclass(frozen=True)
class RoundingPart:
    """A way to round."""

    needs: str
    make: Callable[[LayerProblem, float], Quantize]
    """(problem, damping) -> (W -> (Rounded, values)); `damping` of the result says what it took."""


def _diagonal(problem: LayerProblem, damping: float) -> Metric:
    return Metric(DiagonalRoot(known_inputs(problem).mean_square, damping=damping))


def _gram(problem: LayerProblem, damping: float) -> Metric:
    return Metric(CholeskyRoot(known_gram(problem), damping=damping, strict=problem.strict))


def _rtn(problem: LayerProblem, damping: float) -> Quantize:
    return lambda target: round_to_nearest(target, problem.spec, fit=problem.scale_fit)


def _gptq(problem: LayerProblem, damping: float) -> Gptq:
    spec, fit, strict = problem.spec, problem.scale_fit, problem.strict
    return Gptq(known_gram(problem), spec, fit=fit, damping=damping, strict=strict)


def _descent(problem: LayerProblem, damping: float) -> DescentGptq:
    return DescentGptq(_gptq(problem, damping), known_gram(problem))


METRICS = {
    "identity": MetricPart("none", lambda problem, damping: Metric()),
    "diagonal": MetricPart("diagonal", _diagonal),
    "gram": MetricPart("gram", _gram),
}
ROUNDINGS = {
    "rtn": RoundingPart("none", _rtn),
    "gptq": RoundingPart("gram", _gptq),
    "gptq-descent": RoundingPart("gram", _descent),
}


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
