"""A small stack of random weights as a LayerProblem, with statistics of inputs that correlate."""

from __future__ import annotations

import torch
from torch import Tensor

from loftq.formats import parse_format
from loftq.methods import LayerProblem, LayerSolution, ProblemStatistics

OUT, IN = 96, 128


def statistics(n: int = 2, columns: int = IN, tokens: int = 1000) -> ProblemStatistics:
    """Of correlated inputs of many variances, a tenth of each lost on the way (drift)."""
    g = torch.Generator().manual_seed(1)
    x = torch.randn(n, tokens, columns, generator=g)
    x = (x @ torch.randn(n, columns, columns, generator=g)) * torch.logspace(-1, 1, columns)
    gram = x.mT @ x / tokens
    return ProblemStatistics(
        mean_square=gram.diagonal(dim1=1, dim2=2).double(),
        largest_mean=x.abs().mean(1).double(),
        gram=gram,
        tokens=(tokens,) * n,
        dropped=(0,) * n,
        fisher_rows=torch.rand(n, OUT, generator=g).double().square() + 1e-3,
        fisher_columns=torch.rand(n, columns, generator=g).double().square() + 1e-3,
        drift=0.1 * gram,
    )


def problem(
    scaling: float = 1.0,
    rank: int = 8,
    n: int = 2,
    fit: str = "absmax",
    name: str = "nf2-g64-dq",
    known: ProblemStatistics | None = None,
) -> LayerProblem:
    """n weights of OUT x IN."""
    W = torch.randn(n, OUT, IN, generator=torch.Generator().manual_seed(0))
    return LayerProblem(
        names=tuple(f"layer{i}" for i in range(n)),
        weights=W,
        spec=parse_format(name),
        rank=rank,
        scaling=scaling,
        scale_fit=fit,
        seeds=tuple(range(n)),
        statistics=known,
    )


def effective(solution: LayerSolution, scaling: float, i: int = 0) -> Tensor:
    """Q + scaling B A of weight i, from its packed form."""
    return solution.quantized[i].dequantize() + scaling * solution.lora_B[i] @ solution.lora_A[i]
