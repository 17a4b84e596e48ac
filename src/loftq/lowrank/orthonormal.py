"""Orthonormal columns by CholeskyQR: products and one small factor, where a GPU's QR crawls.

Y^T Y = C C^T gives Q = Y C^-T. What one round leaves of the orthogonality, about eps cond(Y)^2, the
second takes away (Yamamoto et al. 2015), so in float64 any Y that float32 could hold will do.
"""

from __future__ import annotations

import torch
from torch import Tensor

JITTER = 1e-12  # on the diagonal of the first Gram, whose entries are 1


def orthonormal(Y: Tensor) -> tuple[Tensor, Tensor]:
    """(Q, R) with Y = Q R, of each matrix of a stack.

    Columns are normalized first; a column that is numerically dependent on the others is replaced
    by jitter, which keeps the factorization defined for every finite Y. So nothing is checked here,
    which would make a GPU wait for the host; of an infinite Y comes NaN. The small factor is
    inverted, since a product with it is many times faster on a GPU than a solve of the long
    columns, and the second round takes care of what that costs in accuracy.

    Args:
        Y: (n, rows, columns), any float dtype; rows >= columns.

    Returns:
        (Q (n, rows, columns), R (n, columns, columns) upper triangular), float64.
    """
    size = torch.linalg.vector_norm(Y, dim=-2, keepdim=True).clamp_min(1e-30)
    Q = (Y / size).double()
    eye = torch.eye(Q.shape[-1], dtype=Q.dtype, device=Q.device)
    R = torch.diag_embed(size[..., 0, :].double())
    for _ in range(2):
        lower, _ = torch.linalg.cholesky_ex(Q.mT @ Q + JITTER * eye)
        Q = Q @ torch.linalg.solve_triangular(lower, eye, upper=False).mT
        R = lower.mT @ R
    return Q, R
