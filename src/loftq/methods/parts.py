"""The parts that a row of the method table is put together from, by name.

A new metric, rounding or schedule is an entry here; neither methods nor the pipeline ask for names.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from loftq.formats import from_stored_basis, to_stored_basis
from loftq.lowrank import (
    CholeskyRoot,
    CovarianceRoot,
    DiagonalRoot,
    EigenRoot,
    LeastSquaresSolver,
    Metric,
    Solver,
    WhitenedSolver,
    make_solver,
)
from loftq.methods.problem import LayerProblem, in_stored_basis, known_gram, known_inputs
from loftq.methods.target import sequential_target
from loftq.rounding import DescentGptq, Gptq, Rounded, round_to_nearest
from loftq.schedules import Alternation, Quantize, alternate, preserve, project
from loftq.transforms import magr, rotate_gram

if TYPE_CHECKING:
    from loftq.methods.base import Method

NEEDS = ("none", "diagonal", "gram", "fisher")
"""Statistics, in rising order: whoever has a Gram has the diagonal. Fisher means come with the
diagonal of the inputs, without their Gram."""


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
    make: Callable[[LayerProblem, Tensor | None, float], Quantize]
    """(problem, Gram in place of the inputs' own, damping) -> W -> (Rounded, values)."""
    cost: float
    """Time of a step relative to "rtn", on a CPU and roughly."""


@dataclass(frozen=True)
class TransformPart:
    """Something done to a weight each time before it is rounded."""

    needs: str
    apply: Callable[[LayerProblem, Tensor, Tensor | None], Tensor]
    """(problem, W, Gram in place of the inputs' own) -> what is rounded."""
    cost: float
    """As of a rounding."""


def _magr(problem: LayerProblem, W: Tensor, gram: Tensor | None) -> Tensor:
    gram = known_gram(problem) if gram is None else gram
    return magr(W, gram, group_size=problem.spec.group_size)


def _diagonal(problem: LayerProblem, damping: float) -> Metric:
    return Metric(DiagonalRoot(known_inputs(problem).mean_square, damping=damping))


def _largest_mean(problem: LayerProblem, damping: float) -> Metric:
    """LQER's D_i = a_i / sqrt(min a max a): a constant factor, as its root, changes no B A."""
    return Metric(DiagonalRoot(known_inputs(problem).largest_mean.square(), damping=damping))


def _gram(problem: LayerProblem, damping: float) -> Metric:
    return Metric(CholeskyRoot(known_gram(problem), damping=damping, strict=problem.strict))


def _eigenspace(problem: LayerProblem, damping: float) -> Metric:
    return Metric(EigenRoot(known_gram(problem), damping=damping, strict=problem.strict))


def _covariance(problem: LayerProblem, damping: float) -> Metric:
    return Metric(CovarianceRoot(known_gram(problem), damping=damping, strict=problem.strict))


def _fisher(problem: LayerProblem, damping: float) -> Metric:
    """LQ-LoRA's D_col and D_row: roots of the means of the Fisher diagonal."""
    known = known_inputs(problem)
    if known.fisher_rows is None or known.fisher_columns is None:
        raise ValueError(f"{problem.names[0]}: this method needs Fisher means of the weights.")
    return Metric(
        DiagonalRoot(known.fisher_columns, damping=damping),
        DiagonalRoot(known.fisher_rows, damping=damping),
    )


def _rtn(problem: LayerProblem, gram: Tensor | None, damping: float) -> Quantize:
    return lambda target: round_to_nearest(target, problem.spec, fit=problem.scale_fit)


def _gptq(problem: LayerProblem, gram: Tensor | None, damping: float) -> Gptq:
    gram = known_gram(problem) if gram is None else gram
    spec, fit, strict = problem.spec, problem.scale_fit, problem.strict
    return Gptq(gram, spec, fit=fit, damping=damping, strict=strict)


def _descent(problem: LayerProblem, gram: Tensor | None, damping: float) -> DescentGptq:
    gram = known_gram(problem) if gram is None else gram
    return DescentGptq(_gptq(problem, gram, damping), gram)


METRICS = {
    "identity": MetricPart("none", lambda problem, damping: Metric()),
    "diagonal": MetricPart("diagonal", _diagonal),
    "largest-mean": MetricPart("diagonal", _largest_mean),
    "gram": MetricPart("gram", _gram),
    "eigenspace": MetricPart("gram", _eigenspace),
    "covariance": MetricPart("gram", _covariance),
    "fisher": MetricPart("fisher", _fisher),
}
TRANSFORMS = {
    "none": TransformPart("none", lambda problem, W, gram: W, 0.0),
    "magr": TransformPart("gram", _magr, 20.0),
}
ROUNDINGS = {
    "rtn": RoundingPart("none", _rtn, 1.0),
    "gptq": RoundingPart("gram", _gptq, 6.0),
    "gptq-descent": RoundingPart("gram", _descent, 20.0),
}
CORRECTIONS: dict[str, Callable[[Solver, Metric], Solver]] = {
    "closed-form": WhitenedSolver,
    "least-squares": LeastSquaresSolver,
}
"""A plain solver -> the best correction under a metric."""


class Parts:
    """What a row names, made for one problem.

    Args:
        method: the row.
        problem: the stack.
        generator: of everything random.
    """

    def __init__(self, method: Method, problem: LayerProblem, generator: torch.Generator) -> None:
        self.method, self.problem = method, problem
        self.target = problem.weights
        """What Q + B A is to be."""
        if method.sequential:
            self.target = sequential_target(
                problem, blend=method.blend, damping=method.target_damping
            )
        self.rounded = self.target if method.rounded == "target" else problem.weights
        """What Q is made from."""
        self.metric = METRICS[method.metric].make(problem, method.metric_damping)
        self.leading: Solver = make_solver(method.solver, problem.rank, generator)
        """A plain solver, for eigenvectors."""
        self.generator = generator
        self.solver: Solver = self.correction(problem.rank)
        """Best correction under the metric."""
        self.asked = {"metric": method.metric_damping, "rounding": method.damping}
        self.used: dict[str, Tensor] = {}
        """Damping that each factorized Gram took, (n,)."""
        self._record("metric", getattr(self.metric.input, "damping", None), 0.0)

    def correction(self, rank: int) -> Solver:
        """A solver of that rank for the best correction under the metric, with its own state.

        Raises:
            ValueError: the rank does not fit the weights.
        """
        most = min(self.problem.weights.shape[1:])
        if not 1 <= rank <= most:
            raise ValueError(f"{self.problem.names[0]}: rank {rank} is outside 1..{most}.")
        plain = make_solver(self.method.solver, rank, self.generator)
        if METRICS[self.method.metric].needs == "none":
            return plain
        return CORRECTIONS[self.method.correction](plain, self.metric)

    def rounding(self, gram: Tensor | None = None) -> Quantize:
        """The row's rounding under the Gram of the inputs, or under another, damped already.

        In the basis that the format stores: q(W R) R^T where that is rotated.
        """
        make, damping = ROUNDINGS[self.method.rounding].make, self.method.damping
        problem, spec = in_stored_basis(self.problem), self.problem.spec
        turned = None if gram is None else rotate_gram(gram, spec.rotation)
        made = make(problem, turned, damping if gram is None else 0.0)
        before = 0.0 if gram is None else damping
        self._record("rounding", getattr(made, "damping", None), before)
        transform = TRANSFORMS[self.method.transform]

        def quantize(W: Tensor) -> tuple[Rounded, Tensor]:
            rounded, values = made(transform.apply(problem, to_stored_basis(W, spec), turned))
            return replace(rounded, spec=spec), from_stored_basis(values, spec)

        return quantize

    def damping_of(self, i: int) -> tuple[float | None, tuple[str, ...]]:
        """Largest damping of weight i's Gram, and notes where more was needed than asked for."""
        used = {what: float(found[i]) for what, found in self.used.items()}
        notes = tuple(
            f"damping of the {what} raised from {self.asked[what]:g} to {value:g}: no Cholesky "
            "factor"
            for what, value in used.items()
            if value > self.asked[what]
        )
        return max(used.values(), default=None), notes

    def _record(self, what: str, used: Tensor | None, before: float) -> None:
        if used is not None:
            total = used + before
            self.used[what] = torch.maximum(total, self.used.get(what, total))


def _alternate(parts: Parts) -> Alternation:
    method = parts.method
    return alternate(
        parts.rounded,
        quantize=parts.rounding(),
        solver=parts.solver,
        iterations=method.iterations,
        order=method.order,
        keep=method.keep,
        norm=parts.metric.norm,
    )


def _project(parts: Parts) -> Alternation:
    if parts.method.iterations == 0:
        return _alternate(parts)
    return _projected(parts, leading=parts.leading)


def _project_residual(parts: Parts) -> Alternation:
    method = parts.method
    if method.iterations == 0:
        return _alternate(parts)
    ahead = method.design_rank
    design = None if ahead in (None, parts.problem.rank) else parts.correction(ahead)
    return _projected(parts, design=design, span="round")


def _projected(parts: Parts, **choices: Any) -> Alternation:
    root, method = parts.metric.input, parts.method
    assert isinstance(root, CholeskyRoot), f"{method.name}: projection needs metric='gram'"
    return project(
        parts.rounded,
        aim=parts.target,
        root=root.factor,
        quantize_under=parts.rounding,
        solver=parts.solver,
        iterations=method.iterations,
        damping=method.damping,
        norm=parts.metric.norm,
        **choices,
    )


def _preserve(parts: Parts) -> Alternation:
    if parts.method.iterations == 0:
        return _alternate(parts)
    return preserve(
        parts.target,
        metric=parts.metric,
        quantize=parts.rounding(),
        rank=parts.problem.rank,
        generator=parts.generator,
    )


SCHEDULES = {
    "alternate": _alternate,
    "projection": _project,
    "residual-projection": _project_residual,
    "preserve": _preserve,
}
