"""A method as a row of choices over shared parts, and what it makes of a problem."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from loftq.formats import QuantizedTensor
from loftq.lowrank import LowRank
from loftq.methods.parts import CORRECTIONS, METRICS, NEEDS, ROUNDINGS, SCHEDULES, TRANSFORMS, Parts
from loftq.methods.problem import LayerProblem, input_notes
from loftq.methods.rival import better_of
from loftq.methods.target import ROUNDED, TARGETS
from loftq.refine import REFINEMENTS
from loftq.rounding import output_error, round_to_nearest
from loftq.schedules import Alternation, frobenius


@dataclass(frozen=True, kw_only=True)
class LayerRecord:
    """What became of one weight; written to loftq.json and read by the report."""

    name: str
    method: str
    format: str
    scale_fit: str
    rank: int
    scaling: float
    solver: str
    plain_error: float
    """||W - q(W)||_F / ||W||_F: rounding alone, in this format and with this fit."""
    error: float
    """||W - Q - scaling B A||_F / ||W||_F of what is stored, decoded scales and scaled factors."""
    errors: tuple[float, ...]
    """The same after each step of the schedule, before the factors are scaled; in the method's
    metric, so an output error where that is the Gram, and of its target (methods/target.py)."""
    kept: int
    """Alternation whose result is stored (1-based); 0 = plain rounding."""
    bits_per_weight: float
    """Backbone bytes over weights, scales and zeros included."""
    output_error: float | None = None
    """||(W - Q - scaling B A) R||_F / ||W R||_F, R R^T = E[x x^T] of the calibration tokens, not
    damped; None without statistics, and as if inputs were uncorrelated with a diagonal alone. In
    sequence, x is what the layer reads with all before it quantized."""
    plain_output_error: float | None = None
    """The same of rounding to nearest alone."""
    tokens: int | None = None
    """Calibration tokens counted."""
    damping: float | None = None
    """Largest damping used, relative to the mean of the Gram's diagonal; None without a Gram."""
    notes: tuple[str, ...] = ()
    """Anything that did not go the plain way: fallbacks, extra damping."""
    preserved: int | None = None
    """Ranks that hold a part of W itself (srr); None where the rank was not split."""
    rival: str | None = None
    """Format that was tried as well; None where nothing was."""
    rival_error: float | None = None
    """Its error, in the method's metric as `errors` are (methods/rival.py)."""

    def to_dict(self) -> dict[str, object]:
        """JSON-ready."""
        return asdict(self)


@dataclass(frozen=True, kw_only=True)
class LayerSolution:
    """The stored form of each weight of a problem. Factors carry 1 / sqrt(scaling) each."""

    quantized: tuple[QuantizedTensor, ...]
    lora_A: Tensor
    """(n, rank, in_features) float32."""
    lora_B: Tensor
    """(n, out_features, rank) float32."""
    records: tuple[LayerRecord, ...] = field(default=())


@dataclass(frozen=True, kw_only=True)
class Method:
    """A way to choose Q, A and B for a layer, given by its row of choices."""

    name: str
    paper: str
    """arXiv number of the source, or "" for our own."""
    summary: str
    """One line for tables and --help."""
    needs: str = "none"
    """Statistics of the inputs that it must be given: none, diagonal, gram or fisher."""
    metric: str = "identity"
    """What an error costs: identity, diagonal, largest-mean, gram, eigenspace, covariance
    or fisher (methods/parts.py)."""
    transform: str = "none"
    """What is done to a weight each time before it is rounded: none or magr (transforms)."""
    rounding: str = "rtn"
    """How weights become codes: rtn, gptq or gptq-descent (rounding)."""
    schedule: str = "alternate"
    """How rounding and correction take turns: alternate, projection, residual-projection or
    preserve (schedules)."""
    correction: str = "closed-form"
    """How the best correction under the metric is found: closed-form or least-squares."""
    design_rank: int | None = None
    """Rank that residual-projection rounds for; None = that of the adapter."""
    target: str = "symmetric"
    """symmetric: statistics of the original model, W is aimed at. sequential: layer after layer,
    statistics of the model quantized so far, and W*(blend) is aimed at (methods/target.py)."""
    blend: float = 0.5
    """a of the sequential target: 0 = W itself, 1 = all of what came before is made up for."""
    target_damping: float = 0.01
    """Of the Gram in the sequential target, in the same unit as `damping`."""
    rounded: str = "target"
    """What Q is made from where the target is not W: the target, or weight: W itself, so that only
    B A makes up for what came before, and may forget it in training (projection only)."""
    damping: float = 0.01
    """Of the Gram that rounds, relative to the mean of its diagonal."""
    metric_damping: float = 1e-4
    """Of the metric, in the same unit."""
    iterations: int = 5
    """Steps T of the schedule; 0 rounds once and starts with a zero product."""
    order: str = "quantize-first"
    """Half-step that comes first (schedules/alternate.py)."""
    keep: str = "best"
    """Iterate that is stored: best or last."""
    solver: str = "chebyshev"
    """Low-rank solver (lowrank)."""
    refinement: str = "none"
    """What gradients do to the adapters afterwards: a row of refine.REFINEMENTS."""
    scale_fit: str | None = None
    """Fit the method prescribes; None = the format's default."""
    grid: str | None = None
    """Grid the method prescribes for --bits; None = that of --bits itself, nf."""
    scale_coding: str | None = None
    """Scale coding the method prescribes; None = as the format says."""
    reproduction: bool = False
    """A paper's algorithm to the letter, listed by `loftq lab methods`, not by --help."""

    def __post_init__(self) -> None:
        for choice, known in (
            (self.metric, METRICS),
            (self.transform, TRANSFORMS),
            (self.rounding, ROUNDINGS),
            (self.schedule, SCHEDULES),
            (self.correction, CORRECTIONS),
            (self.target, TARGETS),
            (self.rounded, ROUNDED),
            (self.refinement, REFINEMENTS),
        ):
            assert choice in known, f"{self.name}: {choice} is none of {', '.join(known)}"
        wanted = (
            METRICS[self.metric].needs,
            TRANSFORMS[self.transform].needs,
            ROUNDINGS[self.rounding].needs,
            "gram" if self.sequential else "none",
        )
        assert self.rounded == "target" or self.schedule == "projection", f"{self.name}: rounded"
        assert NEEDS.index(self.needs) >= max(map(NEEDS.index, wanted)), f"{self.name}: needs"

    @property
    def adapter_required(self) -> bool:
        """Whether Q is not W rounded by itself, so that it is worse without its adapter."""
        ahead = self.order == "correct-first" or self.schedule != "alternate"
        return self.iterations > 1 or (self.iterations == 1 and ahead)

    @property
    def sequential(self) -> bool:
        """Whether each layer is solved with all before it quantized."""
        return self.target == "sequential"

    @property
    def refined(self) -> bool:
        """Whether gradients work on the adapters, for which it needs text."""
        return bool(REFINEMENTS[self.refinement].stages)

    @property
    def step_cost(self) -> float:
        """Time of one step relative to rounding to nearest with its correction; plans only."""
        return ROUNDINGS[self.rounding].cost + TRANSFORMS[self.transform].cost

    def with_options(self, **options: Any) -> Method:
        """A copy with other choices, e.g. iterations=1; None leaves a choice as it is."""
        return replace(self, **{k: v for k, v in options.items() if v is not None})

    def choices(self) -> dict[str, object]:
        """All that decides a solution, JSON-ready: nothing that is only told of the row."""
        told = ("name", "paper", "summary", "reproduction")
        return {key: value for key, value in asdict(self).items() if key not in told}

    def solve(self, problem: LayerProblem) -> LayerSolution:
        """Quantize the stack and find its adapters.

        Minimises ||(W* - Q - s B A) R|| over Q in the format and rank(B A) <= r, R the root of the
        method's metric (identity: the Frobenius norm), W* its target: W, unless it is sequential.
        s is part of the problem: both factors are divided by sqrt(s), so the effective start is
        the same for every alpha (neither the paper's code nor PEFT's does this).

        Raises:
            ValueError: statistics that the method needs are missing.
            DampingError: strict, and a Gram needs more damping.
        """
        if problem.rival is not None:
            other = replace(problem, spec=problem.rival, rival=None)
            return better_of(self.solve(replace(problem, rival=None)), self.solve(other))
        parts = Parts(self, problem, _generator(problem.seeds))
        found = SCHEDULES[self.schedule](parts)
        factors = found.low_rank or fresh_adapter(problem.weights, problem.rank, problem.seeds)
        root = math.sqrt(problem.scaling)
        factors = LowRank(factors.B / root, factors.A / root)
        return LayerSolution(
            quantized=tuple(found.rounded.pack(i) for i in range(len(problem.names))),
            lora_A=factors.A,
            lora_B=factors.B,
            records=self._records(problem, parts, found, factors),
        )

    def _records(
        self, problem: LayerProblem, parts: Parts, found: Alternation, factors: LowRank
    ) -> tuple[LayerRecord, ...]:
        W, spec, values = problem.weights, problem.spec, found.rounded.decode()
        plain, plain_output = self._plain_errors(problem, found)
        output = _output_errors(
            problem, lambda i: W[i] - values[i] - problem.scaling * (factors.B[i] @ factors.A[i])
        )
        kept, errors = found.kept.tolist(), found.errors.mT.tolist()
        records = []
        for i, name in enumerate(problem.names):
            damping, notes = parts.damping_of(i)
            A, B = factors.A[i], factors.B[i]
            record = LayerRecord(
                name=name,
                method=self.name,
                format=str(spec),
                scale_fit=problem.scale_fit,
                rank=problem.rank,
                scaling=problem.scaling,
                solver=self.solver,
                plain_error=plain[i],
                error=relative_error(W[i], values[i], B, A, problem.scaling),
                errors=tuple(errors[i]),
                kept=kept[i],
                bits_per_weight=spec.bits_per_weight(W.shape[1], W.shape[2]),
                output_error=output[i],
                plain_output_error=plain_output[i],
                tokens=problem.statistics.tokens[i] if problem.statistics else None,
                damping=damping,
                notes=(*notes, *input_notes(problem, i)),
                preserved=None if found.preserved is None else int(found.preserved[i]),
            )
            records.append(record)
        return tuple(records)

    def _plain_errors(
        self, problem: LayerProblem, found: Alternation
    ) -> tuple[list[float], list[float | None]]:
        """Weight and output error of rounding to nearest alone."""
        W = problem.weights
        if problem.statistics is None and found.plain_error is not None:
            return found.plain_error.tolist(), [None] * len(W)
        E = W - round_to_nearest(W, problem.spec, fit=problem.scale_fit)[1]
        weight = frobenius(E) / frobenius(W).clamp_min(torch.finfo(torch.float32).tiny)
        return weight.tolist(), _output_errors(problem, lambda i: E[i])


def fresh_adapter(W: Tensor, rank: int, seeds: tuple[int, ...]) -> LowRank:
    """LoRA's own start: A uniform with variance 1 / (3 in_features), B zero (arXiv:2106.09685)."""
    n, out_features, in_features = W.shape
    bound = 1 / math.sqrt(in_features)
    A = torch.stack(
        [
            torch.empty(rank, in_features).uniform_(-bound, bound, generator=_generator((seed,)))
            for seed in seeds
        ]
    )
    return LowRank(W.new_zeros(n, out_features, rank), A.to(W.device))


def relative_error(W: Tensor, Q: Tensor, B: Tensor, A: Tensor, scaling: float) -> float:
    """||W - Q - scaling B A||_F / ||W||_F of one weight, norms in float64, row blocks at a time.

    This is the number in a record; `loftq inspect --check` computes it again from the files.
    """
    total = torch.zeros(2, dtype=torch.float64, device=W.device)  # of the difference, of W
    step = max(1, (1 << 22) // W.shape[1])
    for start in range(0, len(W), step):
        at = slice(start, start + step)
        left = W[at].double()
        total[1] += left.square().sum()
        total[0] += (left - Q[at] - scaling * (B[at] @ A)).square().sum()
    difference, norm = total.tolist()
    return math.sqrt(difference / norm) if norm else math.sqrt(difference)


def _output_errors(problem: LayerProblem, residual: Callable[[int], Tensor]) -> list[float | None]:
    """||E R||_F / ||W R||_F of each residual E, in float64; None without statistics."""
    known = problem.statistics
    if known is None:
        return [None] * len(problem.names)
    found: list[float | None] = []
    for i, W in enumerate(problem.weights):
        pair = (residual(i), W)
        if known.gram is None:  # a diagonal one, which is not to be made dense
            weight = known.mean_square[i].double()
            both = torch.stack([(X.double().square() * weight).sum() for X in pair])
        else:
            both = output_error(torch.stack(pair), known.gram[i])
        left, whole = both.clamp_min(0).sqrt().tolist()
        found.append(left / whole if whole else left)
    return found


def _generator(seeds: tuple[int, ...]) -> torch.Generator:
    return torch.Generator().manual_seed(seeds[0])
