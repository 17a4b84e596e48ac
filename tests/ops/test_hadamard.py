"""The rotation of inputs: orthogonal, its own reference in plain loops, gradients, refusals."""

from __future__ import annotations

import pytest
import torch

from loftq.ops import hadamard
from loftq.ops.hadamard import BLOCKS, column_signs, hadamard_matrix


def rotation(features: int, block: int) -> torch.Tensor:
    """R in float64, element by element."""
    R = torch.zeros(features, features, dtype=torch.float64)
    for i in range(features):
        first = i // block * block
        for j in range(first, first + block):
            odd = bin((i - first) & (j - first)).count("1") % 2
            R[i, j] = (-1 if odd else 1) * float(column_signs(features)[i]) / block**0.5
    return R


@pytest.mark.parametrize(("features", "block"), [(16, 16), (96, 32), (192, 64)])
def test_rotation_is_the_orthogonal_matrix_of_signs_and_hadamard_blocks(
    features: int, block: int
) -> None:
    eye = torch.eye(features, dtype=torch.float64)
    R = hadamard(eye, block, False)
    torch.testing.assert_close(R, rotation(features, block), atol=1e-15, rtol=0)
    torch.testing.assert_close(R @ R.T, eye, atol=1e-14, rtol=0)
    torch.testing.assert_close(hadamard(eye, block, True), R.T, atol=1e-14, rtol=0)


@pytest.mark.parametrize("block", BLOCKS)
def test_hadamard_matrix_has_orthogonal_rows(block: int) -> None:
    H = hadamard_matrix(block)
    assert torch.equal(H @ H.T, block * torch.eye(block))


def test_signs_are_balanced_and_the_same_for_every_width() -> None:
    signs = column_signs(8192)
    assert torch.equal(column_signs(100), signs[:100])
    assert abs(float(signs.mean())) < 0.03
    pairs = (signs[1:] * signs[:-1]).mean()
    assert abs(float(pairs)) < 0.03


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_back_and_forth_gives_the_inputs(dtype: torch.dtype) -> None:
    x = torch.randn(3, 5, 192, generator=torch.Generator().manual_seed(0)).to(dtype)
    back = hadamard(hadamard(x, 64, False), 64, True)
    assert back.dtype is dtype
    error = torch.linalg.vector_norm((back - x).float()) / torch.linalg.vector_norm(x.float())
    assert error < 2 * torch.finfo(dtype).eps


def test_gradient_is_the_inverse_rotation() -> None:
    x = torch.randn(2, 3, 32, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: hadamard(x, 16, False), (x,))
    assert torch.autograd.gradcheck(lambda x: hadamard(x, 16, True), (x,))
    torch.library.opcheck(hadamard, (torch.randn(4, 64, requires_grad=True), 64, False))


def test_width_that_is_not_whole_blocks_is_refused() -> None:
    with pytest.raises(ValueError, match="100 columns are not whole blocks of 64"):
        hadamard(torch.zeros(1, 100), 64, False)
    with pytest.raises(ValueError, match="whole blocks of 48"):
        hadamard(torch.zeros(1, 96), 48, False)
