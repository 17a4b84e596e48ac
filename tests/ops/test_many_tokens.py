"""The product of some hundred tokens against float64: interpreted here, compiled on a GPU."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from loftq.ops.dispatch import MOST_TOKENS, many_tokens_kernel, why_no_many_tokens
from packed_product import Problem

INTERPRETED = (
    ("nf4", 33, 256, 70, {}), ("nf3", 17, 320, 9, {"tokens": 64, "warps": 4}),
    ("nf2-f16", 150, 128, 65, {"tokens": 64, "warps": 16}), ("int4", 70, 1152, 2, {"tokens": 64}),
    ("int3-g128-bf16", 7, 192, 17, {"tokens": 64}), ("sint2-channel", 5, 64, 1, {"tokens": 64}),
)  # fmt: skip
FORMATS = (
    "nf4", "nf3", "nf2", "nf4-g128-f32", "nf3-g256-f16", "nf2-channel-bf16", "snf3-g128", "even4",
    "int4", "int3-g128-f16", "int2", "sint4-f16", "sint3", "sint2-g128-bf16",
)  # fmt: skip
SHAPES = ((4097, 320, 129), (640, 11008, 257))  # rows, columns, tokens


def check_interpreted():
    import ptx
    from loftq.ops.triton.many_tokens import Launch, many_tokens_linear

    ptx.teach_triton()
    for name, rows, columns, tokens, launch in INTERPRETED:
        problem = Problem(name, rows, columns, tokens, torch.float16, "cpu")
        shape = Launch(**launch) if launch else None
        problem.check(many_tokens_linear(problem.x, *problem.packed, launch=shape))


def test_the_product_is_as_exact_as_the_dense_one_interpreted():
    pytest.importorskip("triton", reason="needs triton")
    code = "import test_many_tokens as t; t.check_interpreted(); print('exact')"
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    environment["PYTHONPATH"] = os.pathsep.join([str(Path(__file__).parent), *sys.path])
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False
    )
    assert done.stdout.strip().endswith("exact"), done.stderr[-2000:]


def test_the_dispatcher_says_why_a_weight_is_dequantized(monkeypatch):
    monkeypatch.setattr("loftq.ops.dispatch.MOST_TOKENS_FUSED", 512)
    packed = torch.zeros(2, 32, dtype=torch.uint8, device="meta")
    x = torch.zeros(70, 64, dtype=torch.bfloat16, device="meta")
    assert many_tokens_kernel(x, packed, 4, 64) is None
    assert why_no_many_tokens(x, packed, 4, 64) == "weights are on meta, the kernels need a GPU"
    assert "torch.float32" in why_no_many_tokens(x.float(), packed, 4, 64)
    assert "groups of 32" in why_no_many_tokens(x, packed, 4, 32)
    for tokens, reason in ((MOST_TOKENS, "up to 64"), (513, "above 512")):
        given = torch.zeros(tokens, 64, dtype=torch.bfloat16, device="meta")
        assert f"{tokens} tokens: {reason}" in why_no_many_tokens(given, packed, 4, 64)


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("name", "dtype"),
    [(name, torch.bfloat16) for name in FORMATS]
    + [(name, torch.float16) for name in ("nf4", "nf3", "int2")],
)
def test_every_format_is_as_exact_as_the_dense_product(name, dtype, poisoned):
    from loftq.ops.triton.many_tokens import many_tokens_linear

    for rows, columns, tokens in SHAPES:
        problem = Problem(name, rows, columns, tokens, dtype, "cuda")
        y = many_tokens_linear(problem.x, *problem.packed)
        problem.check(y)
        assert torch.equal(y, many_tokens_linear(problem.x, *problem.packed))


@pytest.mark.gpu
@pytest.mark.parametrize("multiply", [False, True])
@pytest.mark.parametrize("warps", [4, 8, 16])
def test_every_launch_is_as_exact_as_the_dense_product(warps, multiply, poisoned):
    from loftq.ops.triton.many_tokens import Launch, many_tokens_linear

    for tokens, rows in ((64, 1), (128, 37), (256, 200)):
        if warps == 16 and tokens == 256:
            continue  # its sums fill all registers
        launch = Launch(warps=warps, tokens=tokens, multiply=multiply)
        problem = Problem("nf4", rows, 64, 300, torch.bfloat16, "cuda")
        problem.check(many_tokens_linear(problem.x, *problem.packed, launch=launch))
