"""The problem every method solves, and a method as a row of choices over shared parts."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from loftq.formats import FormatSpec, QuantizedTensor
from loftq.lowrank import LowRank, make_solver
from loftq.rounding import round_to_nearest
from loftq.schedules import alternate


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
    """The same after each alternation, before the factors are scaled."""
    kept: int
    """Alternation whose result is stored (1-based); 0 = plain rounding."""
    bits_per_weight: float
    """Backbone bytes over weights, scales and zeros included."""
    notes: tuple[str, ...] = ()
    """Anything that did not go the plain way: fallbacks, extra damping."""

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
    """Statistics it must be given: none, diagonal, gram, fisher or block_inputs."""
    iterations: int = 5
    """Alternations T; 0 rounds once and starts with a zero product."""
    order: str = "quantize-first"
    """Half-step that comes first (schedules/alternate.py)."""
    keep: str = "best"
    """Iterate that is stored: best or last."""
    solver: str = "chebyshev"
    """Low-rank solver (lowrank)."""
    scale_fit: str | None = None
    """Fit the method prescribes; None = the format's default."""
    scale_coding: str | None = None
    """Scale coding the method prescribes; None = as the format says."""
    reproduction: bool = False
    """A paper's algorithm to the letter, listed by `loftq lab methods`, not by --help."""

    @property
    def adapter_required(self) -> bool:
        """Whether Q is not simply round(W), so that it is worse without its adapter."""
        return self.iterations > 1 or (self.iterations == 1 and self.order == "correct-first")

    def with_options(self, **options: Any) -> Method:
        """A copy with other choices, e.g. iterations=1; None leaves a choice as it is."""
        return replace(self, **{k: v for k, v in options.items() if v is not None})

    def solve(self, problem: LayerProblem) -> LayerSolution:
        """Quantize the stack and find its adapters.

        Minimises ||W - Q - s B A||_F over Q in the format and rank(B A) <= r by alternation; s is
        part of the problem: both factors are divided by sqrt(s), so the effective start is the
        same for every alpha (neither the paper's code nor PEFT's does this).
        """
        W, spec = problem.weights, problem.spec
        solver = make_solver(self.solver, problem.rank, _generator(problem.seeds))
        found = alternate(
            W,
            quantize=lambda target: round_to_nearest(target, spec, fit=problem.scale_fit),
            solver=solver,
            iterations=self.iterations,
            order=self.order,
            keep=self.keep,
        )
        factors = found.low_rank or fresh_adapter(W, problem.rank, problem.seeds)
        root = math.sqrt(problem.scaling)
        lora_B, lora_A = factors.B / root, factors.A / root
        values = found.rounded.decode()
        quantized = tuple(found.rounded.pack(i) for i in range(len(W)))
        plain, kept = found.plain_error.tolist(), found.kept.tolist()
        errors = found.errors.mT.tolist()
        records = tuple(
            LayerRecord(
                name=name,
                method=self.name,
                format=str(spec),
                scale_fit=problem.scale_fit,
                rank=problem.rank,
                scaling=problem.scaling,
                solver=self.solver,
                plain_error=plain[i],
                error=relative_error(W[i], values[i], lora_B[i], lora_A[i], problem.scaling),
                errors=tuple(errors[i]),
                kept=kept[i],
                bits_per_weight=spec.bits_per_weight(W.shape[1], W.shape[2]),
            )
            for i, name in enumerate(problem.names)
        )
        return LayerSolution(quantized=quantized, lora_A=lora_A, lora_B=lora_B, records=records)


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


def _generator(seeds: tuple[int, ...]) -> torch.Generator:
    return torch.Generator().manual_seed(seeds[0])
