"""The few-token product in CUDA C++: its source on the CPU, its code on a GPU."""

import shutil

import pytest
import torch

from cuda_on_cpu import ROOM, Compiler
from loftq.ops.cuda import few_tokens as module
from loftq.ops.cuda.few_tokens import Launch, few_tokens
from packed_product import Problem

CASES = (
    ("nf4", 37, 192, 3), ("nf3", 17, 320, 9), ("nf2-f16", 40, 128, 1), ("int4", 33, 1152, 2),
    ("int3-g128-bf16", 7, 192, 17), ("int2", 50, 256, 1), ("sint2-channel", 5, 64, 1),
    ("nf4-f32", 100, 128, 8),
)  # fmt: skip
LAUNCHES = (
    Launch(warps=2, slab=32, tokens=8, ahead=2), Launch(warps=1, slab=16, tokens=16, ahead=1),
    Launch(warps=4, slab=32, tokens=32, ahead=1),
)  # fmt: skip


@pytest.fixture(scope="module")
def compiler(tmp_path_factory):
    if shutil.which("g++") is None:
        pytest.skip("needs g++ with C++20")
    return Compiler(tmp_path_factory.mktemp("cuda"))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("case", CASES, ids=lambda case: case[0])
def test_the_source_is_as_exact_as_the_dense_product(case, dtype, compiler, monkeypatch):
    monkeypatch.setattr(module, "kernel", compiler)
    monkeypatch.setattr(module, "_room", lambda device: ROOM)
    problem = Problem(*case, dtype, "cpu")
    launch = LAUNCHES[CASES.index(case) % len(LAUNCHES)]
    y = few_tokens(problem.x, *problem.packed, launch=launch, overlap=False)
    problem.check(y)
    y = few_tokens(problem.x, *problem.packed, *problem.adapter, launch=launch, overlap=False)
    problem.check(y, adapter=True)
