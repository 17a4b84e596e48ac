"""The few-token product against float64: interpreted here, compiled on a GPU.

The interpreter needs its variable before Triton is imported, hence a process of its own. It
computes products of float16 rightly, of bfloat16 not.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from loftq.ops import quant_linear, quant_linear_lora
from loftq.ops.dispatch import MOST_TOKENS, small_linear_kernel, why_no_small_linear
from packed_product import Problem

PORTABLE = (
    ("nf4", 33, 256, 3), ("nf3", 17, 37, 1), ("nf2-g16-f16", 20, 63, 9), ("int4-g32", 33, 256, 3),
    ("int3-bf16", 33, 65, 17), ("sint8-channel", 5, 512, 1), ("iq4nl", 7, 1, 1),
    ("nf4", 2, 4097, 2),
)  # fmt: skip
INTERPRETED = (
    ("nf4", 33, 256, 3), ("nf3", 17, 320, 9), ("nf2-f16", 40, 128, 1), ("int4", 33, 1152, 2),
    ("int3-g128-bf16", 7, 192, 17), ("sint2-channel", 5, 64, 1),
)  # fmt: skip
FAST = (
    "nf4", "nf3", "nf2", "nf4-g128-f32", "nf3-g256-f16", "nf2-channel-bf16", "snf3-g128", "even4",
    "int4", "int3-g128-f16", "int2", "sint4-f16", "sint3", "sint2-g128-bf16",
)  # fmt: skip
SHAPES = ((1, 64, 1), (4097, 320, 5), (640, 11008, 31))  # rows, columns, tokens


def check_portable():
    from loftq.ops.triton.linear import small_linear

    for name, rows, columns, tokens in PORTABLE:
        problem = Problem(name, rows, columns, tokens, torch.float16, "cpu")
        problem.check(small_linear(problem.x, *problem.packed, portable=True))
        y = small_linear(problem.x, *problem.packed, *problem.adapter, portable=True)
        problem.check(y, adapter=True)


def check_fast():
    """The assembly in numpy, and both orders of places that Triton's versions ask for."""
    import ptx
    from loftq.ops.triton import linear

    ptx.teach_triton()
    for linear.OPERAND_WIDTH in (4, 2):
        for name, rows, columns, tokens in INTERPRETED:
            problem = Problem(name, rows, columns, tokens, torch.float16, "cpu")
            problem.check(linear.small_linear(problem.x, *problem.packed))
            y = linear.small_linear(problem.x, *problem.packed, *problem.adapter)
            problem.check(y, adapter=True)


@pytest.mark.parametrize("check", ["check_portable", "check_fast"])
def test_the_product_is_as_exact_as_the_dense_one_interpreted(check):
    pytest.importorskip("triton", reason="needs triton")
    code = f"import test_small_linear as t; t.{check}(); print('exact')"
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    environment["PYTHONPATH"] = os.pathsep.join([str(Path(__file__).parent), *sys.path])
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False
    )
    assert done.stdout.strip().endswith("exact"), done.stderr[-2000:]


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("name", "dtype"),
    [(name, torch.bfloat16) for name in FAST]
    + [(name, torch.float16) for name in ("nf4", "nf3", "int2")],
)
def test_fast_decode_is_as_exact_as_the_dense_product(name, dtype, poisoned):
    from loftq.ops.triton.linear import small_linear

    for rows, columns, tokens in SHAPES:
        problem = Problem(name, rows, columns, tokens, dtype, "cuda")
        arguments = (problem.x, problem.stored[0], problem.packed[4], problem.packed[5])
        assert why_no_small_linear(*arguments) == ""
        y = small_linear(problem.x, *problem.packed)
        problem.check(y)
        assert torch.equal(y, small_linear(problem.x, *problem.packed))
        problem.check(quant_linear(problem.x, *problem.packed, True))
    problem.check(quant_linear_lora(problem.x, *problem.packed, *problem.adapter), adapter=True)


@pytest.mark.gpu
@pytest.mark.parametrize("tokens", [1, 9, 33, 64])
@pytest.mark.parametrize("rank", [1, 64, 300])
def test_any_rank_and_number_of_tokens(rank, tokens, poisoned):
    from loftq.ops.triton.linear import small_linear

    problem = Problem("nf4", 130, 256, tokens, torch.bfloat16, "cuda", rank=rank)
    problem.check(small_linear(problem.x, *problem.packed, *problem.adapter), adapter=True)


@pytest.mark.gpu
def test_portable_decode_on_the_gpu(poisoned):
    from loftq.ops.triton.linear import small_linear

    for name, rows, columns, tokens in PORTABLE:
        problem = Problem(name, rows, columns, tokens, torch.bfloat16, "cuda")
        problem.check(small_linear(problem.x, *problem.packed, portable=True))


def test_only_the_callers_word_opens_the_few_token_path(monkeypatch):
    asked = []
    monkeypatch.setattr("loftq.ops.schema.small_linear_kernel", lambda *_: asked.append(1))
    problem = Problem("nf4", 8, 64, 2, torch.float32, "cpu")
    with torch.no_grad():
        quant_linear(problem.x, *problem.packed)
    assert not asked
    quant_linear(problem.x, *problem.packed, True)
    assert asked


def test_the_dispatcher_says_why_a_weight_is_dequantized():
    packed = torch.zeros(2, 32, dtype=torch.uint8, device="meta")
    x = torch.zeros(3, 64, dtype=torch.bfloat16, device="meta")
    assert small_linear_kernel(x, packed, 4, 64) is None
    assert why_no_small_linear(x, packed, 4, 64) == "weights are on meta, the kernels need a GPU"
    assert "torch.float32" in why_no_small_linear(x.float(), packed, 4, 64)
    assert "groups of 32" in why_no_small_linear(x, packed, 4, 32)
    assert "8 bits" in why_no_small_linear(x, packed, 8, 64)
    assert "in_features=37" in why_no_small_linear(x[:, :37], packed, 4, 64)
    many = torch.zeros(MOST_TOKENS + 1, 64, dtype=torch.bfloat16)
    assert f"above {MOST_TOKENS}" in why_no_small_linear(many, packed, 4, 64)
    assert "cast" in why_no_small_linear(x, packed.float(), 4, 64)
