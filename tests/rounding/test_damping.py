import pytest
import torch

from loftq.rounding.damping import BATCHED, DampingError, damped, damped_cholesky


def low_rank_gram(n=3, columns=30, tokens=5):
    x = torch.randn(n, tokens, columns, generator=torch.Generator().manual_seed(0))
    return x.mT @ x / tokens


def test_damping_is_relative_to_the_mean_of_the_diagonal():
    H = low_rank_gram()
    mean = H.double().diagonal(dim1=1, dim2=2).mean(1)
    added = damped(H, 0.01) - H.double()
    assert torch.allclose(added, 0.01 * mean[:, None, None] * torch.eye(30).double())


def test_a_gram_that_fails_is_damped_more_and_its_neighbours_are_not():
    H = torch.stack([torch.eye(4), torch.tensor([1.0, 1.0, 1.0, -0.2]).diag(), torch.zeros(4, 4)])
    factors, used = damped_cholesky(H, 0.01)
    assert used[0] == used[2] == 0.01
    assert used[1] == 1.0  # 0.01 and 0.1 leave a negative eigenvalue
    assert torch.allclose(factors @ factors.mT, damped(H, used))


def test_no_damping_is_raised_where_the_gram_is_singular():
    _, used = damped_cholesky(-1e-8 * torch.eye(4)[None] + torch.ones(1, 4, 4), 0.0)
    assert used[0] >= 1e-6


def test_strict_raises_instead():
    H = torch.tensor([1.0, -0.2]).diag()[None]
    with pytest.raises(DampingError, match=r"damping=0\.01\. Calibrate on more tokens"):
        damped_cholesky(H, 0.01, strict=True)


def test_a_matrix_that_is_no_gram_is_refused():
    with pytest.raises(DampingError, match="1 of 1"):
        damped_cholesky(-torch.eye(3)[None], 0.01)


def test_large_matrices_of_a_stack_are_factorized_one_by_one():
    """A batched routine of a GPU is made for small ones; the factors are the same."""
    H = low_rank_gram(n=3, columns=BATCHED + 10)
    factors, used = damped_cholesky(H, 0.01)
    assert used.tolist() == [0.01] * 3
    assert torch.equal(factors, factors.tril())
    assert torch.allclose(factors @ factors.mT, damped(H, used))
