"""Norm, rotation and gate: their gradients, and the kernels against float64."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from loftq.ops import pointwise
from loftq.ops.pointwise_reference import ACTIVATIONS
from tolerances import FLOAT32_ROUNDING, KERNEL_ERROR_RATIO

SHAPES = [(1, 3), (3, 37), (2, 5, 63), (2, 4097)]
EPS = 1e-5


def norm(x: Tensor, weight: Tensor, offset: float = 0.0) -> Tensor:
    """Plain PyTorch in the dtype of x."""
    return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + EPS) * (weight + offset)


def turn(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Likewise."""
    x1, x2 = x.chunk(2, -1)
    return x * cos.unsqueeze(1) + torch.cat([-x2, x1], -1) * sin.unsqueeze(1)


def gradients(function: Callable[..., Tensor], trained: int, grad: Tensor, *args: Any) -> list:
    """The value, and its gradients to the first `trained` arguments."""
    leaves = [arg.detach().requires_grad_() for arg in args[:trained]]
    y = function(*leaves, *args[trained:])
    return [y.detach(), *torch.autograd.grad(y, leaves, grad.to(y.dtype))]


def compare(
    ours: Callable[..., Tensor], plain: Callable[..., Tensor], trained: int, *args: Tensor
) -> None:
    """Error against float64 at most KERNEL_ERROR_RATIO that of plain PyTorch in the same dtype."""
    grad = torch.randn(args[0].shape, device=args[0].device).to(args[0].dtype)
    wanted = gradients(plain, trained, grad, *[arg.double() for arg in args])
    found = gradients(ours, trained, grad, *args)
    known = gradients(plain, trained, grad, *args)
    dtype = args[0].dtype
    floor = FLOAT32_ROUNDING if dtype == torch.float32 else torch.finfo(dtype).eps / 4
    for exact, mine, theirs in zip(wanted, found, known, strict=True):
        errors = [(x.double() - exact).norm() for x in (mine, theirs)]
        assert errors[0] <= KERNEL_ERROR_RATIO * max(errors[1], floor * exact.norm())


@pytest.fixture(params=[torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def dtype(request: pytest.FixtureRequest) -> torch.dtype:
    """Of the activations."""
    torch.manual_seed(0)
    return request.param


@pytest.mark.parametrize("offset", [0.0, 1.0])
@pytest.mark.parametrize("shape", SHAPES)
def test_norm(shape: tuple[int, ...], offset: float, dtype: torch.dtype, device: str) -> None:
    x, weight = torch.randn(shape, device=device), torch.randn(shape[-1], device=device)
    compare(
        lambda x, w: pointwise.rms_norm(x, w, EPS, offset),
        lambda x, w: norm(x, w, offset), 1, x.to(dtype), weight.to(dtype),
    )  # fmt: skip


@pytest.mark.parametrize("tables", [1, 2])
@pytest.mark.parametrize("width", [2, 12, 128])
def test_rotation(width: int, tables: int, dtype: torch.dtype, device: str) -> None:
    x = torch.randn(2, 7, 5, width, device=device).to(dtype).transpose(1, 2)
    angles = torch.randn(tables, 7, width, device=device)
    assert pointwise.rotate(x, angles.cos().to(dtype), angles.sin().to(dtype)).stride() == (
        x.stride()
    )
    compare(pointwise.rotate, turn, 1, x, angles.cos().to(dtype), angles.sin().to(dtype))


def test_a_rotation_and_its_inverse_cancel(device: str) -> None:
    angles = torch.randn(1, 7, 6, device=device).repeat(1, 1, 2)
    x = torch.randn(2, 3, 7, 12, device=device)
    back = pointwise.rotate(pointwise.rotate(x, angles.cos(), angles.sin()), angles.cos(),
                            angles.sin(), True)  # fmt: skip
    torch.testing.assert_close(back, x)


@pytest.mark.parametrize("name", list(ACTIVATIONS))
@pytest.mark.parametrize("shape", SHAPES)
def test_gate(shape: tuple[int, ...], name: str, dtype: torch.dtype, device: str) -> None:
    known = {
        "silu": F.silu, "gelu": F.gelu, "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    }  # fmt: skip
    gate, up = (3 * torch.randn(shape, device=device).to(dtype) for _ in range(2))
    compare(lambda g, u: pointwise.gate(g, u, name), lambda g, u: known[name](g) * u, 2, gate, up)


@pytest.mark.parametrize("name", list(ACTIVATIONS))
def test_gradients_of_a_gate_over_its_inputs_are_those_beside_them(
    name: str, dtype: torch.dtype, device: str
) -> None:
    gate, up, grad = (torch.randn(3, 37, device=device).to(dtype) for _ in range(3))
    wanted = gradients(lambda g, u: pointwise.gate(g, u, name), 2, grad, gate, up)
    leaves = [tensor.clone().requires_grad_() for tensor in (gate, up)]
    made = [leaf.clone() for leaf in leaves]
    y = pointwise.call_gate_once(*made, name)
    found = torch.autograd.grad(y, leaves, grad)
    assert torch.equal(y, wanted[0])
    for mine, over, beside in zip(found, made, wanted[1:], strict=True):
        assert torch.equal(mine, beside)
        assert torch.equal(over, beside)


def test_a_norm_is_computed_again_from_what_its_node_keeps(device: str) -> None:
    x = torch.randn(3, 8, device=device, requires_grad=True)
    weight = torch.randn(8, device=device)
    y = pointwise.call_rms_norm(x, weight, EPS, 1.0)
    node = pointwise.norm_behind(y)
    assert torch.equal(pointwise.norm_again(node), y)
    (found,) = torch.autograd.grad(y.sum(), x)
    torch.testing.assert_close(found, torch.autograd.grad(norm(x, weight, 1.0).sum(), x)[0])
    assert pointwise.norm_behind(2 * y) is None
    assert pointwise.norm_behind(x) is None


def test_the_operators_pass_opcheck(device: str) -> None:
    x = torch.randn(2, 3, 4, 8, device=device, requires_grad=True)
    weight, table = torch.randn(8, device=device), torch.randn(1, 4, 8, device=device)
    for operator, args in (
        (pointwise.rms_norm, (x, weight, EPS, 1.0)),
        (pointwise.rotate, (x, table, table, False)),
        (pointwise.gate, (x, x.detach().clone().requires_grad_(), "silu")),
        (pointwise.gate_backward_, (x.detach(), x.detach().clone(), x.detach().clone(), "silu")),
    ):
        torch.library.opcheck(operator, args)


def check_kernels() -> None:
    """Everything above through the Triton kernels on the CPU, by the interpreter."""
    from loftq.ops.triton import pointwise as kernels

    pointwise.pointwise_kernels = lambda x, *, whole_rows=False: kernels
    for dtype in (torch.float32, torch.float16):  # bfloat16 is cut off there, not rounded
        torch.manual_seed(0)
        for shape in SHAPES[:3]:
            test_norm(shape, 1.0, dtype, "cpu")
            for name in ACTIVATIONS:
                test_gate(shape, name, dtype, "cpu")
                test_gradients_of_a_gate_over_its_inputs_are_those_beside_them(name, dtype, "cpu")
        test_rotation(12, 1, dtype, "cpu")
        test_rotation(128, 2, dtype, "cpu")


def check_trial() -> None:
    """The trial passes the kernels, and fails each one of them that is a little off."""
    from loftq.ops.triton import pointwise as kernels
    from loftq.ops.triton.pointwise_probe import pointwise_is_right

    cpu = torch.device("cpu")
    assert pointwise_is_right(cpu)
    for name in (
        "rms_norm",
        "rms_norm_backward",
        "rotate",
        "gate",
        "gate_backward",
        "gate_backward_",
    ):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(kernels, name, partial(slightly_off, getattr(kernels, name)))
            assert not pointwise_is_right(cpu), name


def slightly_off(kernel: Callable[..., Any], *args: Any) -> Any:
    """What a kernel gives, 1 % too large."""
    y = kernel(*args)
    if y is None:  # over its arguments
        return args[1].mul_(1.01)
    return 1.01 * y if isinstance(y, Tensor) else tuple(1.01 * part for part in y)


@pytest.mark.parametrize("check", ["check_kernels", "check_trial"])
def test_the_kernels_and_their_trial_interpreted(check: str) -> None:
    pytest.importorskip("triton", reason="needs triton")
    code = f"import test_pointwise as t; t.{check}(); print('same')"
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    environment["PYTHONPATH"] = os.pathsep.join([str(Path(__file__).parent), *sys.path])
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False
    )
    assert done.stdout.strip().endswith("same"), done.stderr[-2000:]
