import pytest
import torch

from loftq.ops.precision import full_float32


@pytest.fixture
def restored():
    """The process' precision as it was."""
    before = torch.get_float32_matmul_precision()
    yield
    torch.set_float32_matmul_precision(before)


@pytest.mark.parametrize("allowed", ["highest", "high", "medium"])
def test_products_are_full_inside_and_as_allowed_after(allowed, restored):
    torch.set_float32_matmul_precision(allowed)
    products = (torch.backends.cuda.matmul, torch.backends.mkldnn.matmul)
    before = [one.fp32_precision for one in products]
    with full_float32():
        inside = [one.fp32_precision for one in products]
    assert inside == ["ieee", "ieee"]
    assert [one.fp32_precision for one in products] == before
    assert torch.get_float32_matmul_precision() == allowed


@pytest.mark.gpu
def test_a_product_on_the_gpu_keeps_all_digits(restored):
    torch.set_float32_matmul_precision("medium")
    x = torch.randn(256, 256, device="cuda")
    exact = x.double() @ x.double()
    rounded = (x @ x - exact).abs().max()
    with full_float32():
        full = (x @ x - exact).abs().max()
    assert full < rounded / 50  # 24 significant bits instead of 11
