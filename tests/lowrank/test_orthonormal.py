import pytest
import torch

from loftq.lowrank import orthonormal
from tolerances import FLOAT64_SOLVE


def columns(decay, n=2, rows=200, width=24):
    g = torch.Generator().manual_seed(0)
    Y = torch.randn(n, rows, width, generator=g, dtype=torch.float64)
    mix = torch.randn(width, width, generator=g, dtype=torch.float64)
    return (Y * decay ** torch.arange(width)) @ mix


@pytest.mark.parametrize("decay", [1.0, 0.75])  # condition numbers of 1e2 and 1e5
def test_it_is_the_qr_decomposition(decay):
    Y = columns(decay)
    Q, R = orthonormal(Y)
    size = Y.norm(dim=-2, keepdim=True)
    assert torch.allclose(Q @ R / size, Y / size, rtol=0, atol=1e-8)
    eye = torch.eye(24, dtype=torch.float64).expand(2, -1, -1)
    assert torch.allclose(Q.mT @ Q, eye, rtol=0, atol=FLOAT64_SOLVE)
    assert torch.equal(R, R.triu())


def test_a_repeated_column_leaves_finite_factors():
    Y = columns(1.0)
    Y[..., 3] = Y[..., 2]
    assert all(torch.isfinite(part).all() for part in orthonormal(Y))
