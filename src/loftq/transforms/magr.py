"""MagR (Zhang et al., arXiv:2406.00800): smaller magnitudes at almost the same outputs.

A Gram of inputs has directions in which a weight may move freely. Within them the range of each
group is made small before rounding:

    min_V  tr((V - W) H (V - W)^T) / (2 lambda) + a sum_g ||v_g||_inf,    lambda = lambda_max(H),

by proximal gradient steps of length 1, v <- prox(v - (v - w) H / lambda), where

    prox(v) = argmin_u ||u - v||^2 / 2 + a ||u||_inf = v - P(v),

P the projection on the L1 ball of radius a (Moreau). Taking H in units of lambda makes a mean the
same for every layer. Nothing is stored with the layer: V is only what is rounded.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import pad

PER_ROW, PER_GROUP = 1e-3, 1e-4
"""The paper's a for one scale per row, and for groups."""
ITERATIONS = 150
POWER_STEPS = 30  # an estimate of lambda below 1/2 of it would be needed for steps to diverge


def magr(
    W: Tensor,
    gram: Tensor,
    *,
    group_size: int,
    strength: float | None = None,
    iterations: int = ITERATIONS,
) -> Tensor:
    """Weights of smaller range with nearly the same outputs.

    Args:
        W: (n, out_features, in_features) float32.
        gram: H = E[x x^T], (n, in_features, in_features), any float dtype.
        group_size: columns that share a scale; 0 or less = the whole row.
        strength: a; None = the paper's.
        iterations: proximal gradient steps.

    Returns:
        V, float32, of W's shape. An all-zero Gram leaves nothing to hold on to: V shrinks freely.
    """
    size = group_size if group_size > 0 else W.shape[-1]
    a = strength if strength is not None else (PER_GROUP if group_size > 0 else PER_ROW)
    H = gram.double()
    unit = (H / largest_eigenvalue(H)[:, None, None]).float()
    V = W.clone()
    for _ in range(iterations):
        V = largest_prox(V - (V - W) @ unit, a, size)
    return V


def largest_prox(v: Tensor, a: float, size: int) -> Tensor:
    """argmin_u ||u - v||^2 / 2 + a sum_g ||u_g||_inf over groups of `size` of the last dimension.

    A group whose absolute values sum to a or less becomes 0; else all above a level t are cut to
    it, t such that what is cut off sums to a. Worked case: v = (3, 1), a = 1 gives (2, 1).
    """
    columns = v.shape[-1]
    groups = pad(v, (0, -columns % size)).unflatten(-1, (-1, size))
    ordered = groups.abs().sort(-1, descending=True).values
    counts = torch.arange(1, size + 1, device=v.device)
    levels = (ordered.cumsum(-1) - a) / counts  # of a cut through the k largest
    last = (ordered > levels).sum(-1, keepdim=True).clamp_min(1) - 1
    t = levels.gather(-1, last).clamp_min(0)
    return groups.clamp(-t, t).flatten(-2)[..., :columns]


def largest_eigenvalue(H: Tensor) -> Tensor:
    """lambda_max of each symmetric matrix (n, k, k), (n,), from below; of a zero matrix 1."""
    v = H.abs().sum(-1, keepdim=True) + torch.finfo(H.dtype).tiny
    for _ in range(POWER_STEPS):
        v = v / torch.linalg.vector_norm(v, dim=-2, keepdim=True).clamp_min(1e-300)
        v = H @ v
    found = torch.linalg.vector_norm(v, dim=(-2, -1))
    return torch.where(found > 0, found, torch.ones_like(found))
