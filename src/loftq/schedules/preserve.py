"""Split the rank: preserve what matters most of W, round the rest, repair with what rank is left.

SRR (arXiv:2602.02001). With R the root of the metric and 0 <= k <= r,

    B_1 A_1 = svd_k(W R) R^-1
    Q       = q(W - B_1 A_1)
    B_2 A_2 = svd_{r-k}((W - B_1 A_1 - Q) R) R^-1

k = 0 is the correction of what rounding leaves (QERA); k = r preserves only (QPiSSA's T = 1). What
will be left is taken to be proportional to what is rounded, and as structureless as noise U: with
rho_p(X) the share of ||X||^2 beyond its p leading singular values, k is

    argmin_k  rho_k(W R) rho_{r-k}(U R).

The paper writes y = x W and its S W is our W R, transposed. Its training scales the gradients of
the preserved block down; the first k rows of A and columns of B are that block here.
"""

from __future__ import annotations

import torch
from torch import Tensor

from loftq.lowrank import LowRank, Metric, evenly_split
from loftq.schedules.alternate import Alternation, Quantize


def preserve(
    W: Tensor,
    *,
    metric: Metric,
    quantize: Quantize,
    rank: int,
    generator: torch.Generator,
    preserved: int | None = None,
) -> Alternation:
    """Preserve, round, repair; each weight of the stack with a split of its own.

    Args:
        W: (n, out_features, in_features) float32.
        metric: of the inputs; its output side must be the identity.
        quantize: W -> (Rounded, its values).
        rank: r, 1 <= r <= min(out_features, in_features).
        generator: of the noise U, entries uniform in [-1/2, 1/2).
        preserved: k for every weight; None = the argmin above.

    Returns:
        Alternation of one step without `plain_error`; `preserved` holds each k.
    """
    whitened = metric.apply(W)
    energies, V = _right_singular(whitened)
    if preserved is None:
        noise = torch.rand(W.shape, generator=generator).to(W) - 0.5
        k = best_split(energies, _right_singular(metric.apply(noise))[0], rank)
    else:
        k = torch.full((len(W),), preserved, device=W.device)
    first = _leading(whitened, V, metric, rank)
    places = torch.arange(rank, device=W.device)
    early = places < k[:, None]
    B1, A1 = first[0] * early[:, None], first[1] * early[..., None]
    rest = (W - B1 @ A1).float()
    rounded, values = quantize(rest)
    left = metric.apply(rest - values)
    B2, A2 = _leading(left, _right_singular(left)[1], metric, rank)
    late = places < rank - k[:, None]
    B2, A2 = B2 * late[:, None], A2 * late[..., None]
    low_rank = _joined(evenly_split(B1, A1), evenly_split(B2, A2), k, rank)
    error = metric.norm(rest - values - (B2 @ A2).float()) / metric.norm(W).clamp_min(1e-38)
    return Alternation(
        rounded,
        low_rank,
        None,
        error[None],
        torch.ones(len(W), dtype=torch.int64, device=W.device),
        preserved=k,
    )


def best_split(energies: Tensor, noise: Tensor, rank: int) -> Tensor:
    """argmin over k = 0..rank of rho_k rho'_{rank-k}, for each weight; the smallest k of equals.

    Args:
        energies: squared singular values of W R, (n, m) descending, m >= rank.
        noise: those of U R.
        rank: r.

    Returns:
        k, (n,) int64.
    """
    kept, repaired = beyond(energies)[:, : rank + 1], beyond(noise)[:, : rank + 1].flip(-1)
    return (kept * repaired).argmin(-1)


def beyond(energies: Tensor) -> Tensor:
    """rho_p for p = 0..m: the share of the sum that lies beyond the first p, (n, m + 1)."""
    total = energies.sum(-1, keepdim=True).clamp_min(torch.finfo(energies.dtype).tiny)
    left = energies.flip(-1).cumsum(-1).flip(-1) / total
    return torch.cat([left, torch.zeros_like(left[:, :1])], -1)


def _right_singular(X: Tensor) -> tuple[Tensor, Tensor]:
    """Squared singular values, descending, and right singular vectors as columns, float64."""
    values, vectors = torch.linalg.eigh(X.mT @ X)
    return values.flip(-1).clamp_min(0), vectors.flip(-1)


def _leading(X: Tensor, V: Tensor, metric: Metric, rank: int) -> tuple[Tensor, Tensor]:
    """(B, A) of svd_rank(X) R^-1, best rank-one part first, float64."""
    top = V[..., :rank]
    return X @ top, metric.input.unapply(top.mT)


def _joined(first: LowRank, second: LowRank, k: Tensor, rank: int) -> LowRank:
    """k columns of the first and rank - k of the second, for each weight.

    Both are split evenly by themselves, largest first, so that zero columns come last.
    """
    B, A = torch.empty_like(first.B), torch.empty_like(first.A)
    for i, n in enumerate(k.tolist()):
        B[i] = torch.cat([first.B[i, :, :n], second.B[i, :, : rank - n]], 1)
        A[i] = torch.cat([first.A[i, :n], second.A[i, : rank - n]])
    return LowRank(B, A)
