"""The few-token product in CUDA C++: its source on the CPU, its code on a GPU."""

import shutil

import pytest
import torch

from cuda_on_cpu import ROOM, Compiler
from loftq.ops.cuda import few_tokens as module
from loftq.ops.cuda.few_tokens import Launch, few_tokens
from packed_product import Problem, check_overlap

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
    monkeypatch.setattr(module, "room", lambda device: ROOM)
    problem = Problem(*case, dtype, "cpu")
    launch = LAUNCHES[CASES.index(case) % len(LAUNCHES)]
    y = few_tokens(problem.x, *problem.packed, launch=launch, overlap=False)
    problem.check(y)
    y = few_tokens(problem.x, *problem.packed, *problem.adapter, launch=launch, overlap=False)
    problem.check(y, adapter=True)


FORMATS = (
    "nf4", "nf3", "nf2", "nf4-g128-f32", "nf3-g256-f16", "nf2-channel-bf16", "snf3-g128", "int4",
    "int3-g128-f16", "int2", "sint4-f16", "sint2-g128-bf16",
)  # fmt: skip
SHAPES = ((1, 64, 1), (4097, 320, 5), (640, 11008, 16), (128, 4096, 33), (65, 1152, 64))


@pytest.mark.gpu
@pytest.mark.parametrize("name", FORMATS)
def test_the_product_is_as_exact_as_the_dense_one_and_the_same_each_time(name, poisoned):
    for rows, columns, tokens in SHAPES:
        for dtype in (torch.bfloat16, torch.float16):
            problem = Problem(name, rows, columns, tokens, dtype, "cuda")
            y = few_tokens(problem.x, *problem.packed)
            problem.check(y)
            assert torch.equal(y, few_tokens(problem.x, *problem.packed))
            y = few_tokens(problem.x, *problem.packed, *problem.adapter)
            problem.check(y, adapter=True)


@pytest.mark.gpu
@pytest.mark.parametrize("rank", [1, 64, 300])
def test_any_rank(rank, poisoned):
    problem = Problem("nf4", 130, 2112, 9, torch.bfloat16, "cuda", rank=rank)
    problem.check(few_tokens(problem.x, *problem.packed, *problem.adapter), adapter=True)


@pytest.mark.gpu
def test_overlapping_launches_in_a_graph_give_the_same_bits():
    """Each product reads the last one's output: a launch that read too early would differ."""
    problem = Problem("nf4", 1024, 1024, 4, torch.bfloat16, "cuda", rank=64)

    def chain(overlap):
        x = problem.x
        for step in range(40):
            adapter = problem.adapter if step % 3 else ()
            x = few_tokens(x, *problem.packed, *adapter, overlap=overlap)
            x = x / x.abs().max() if step % 5 == 4 else x
        return x

    check_overlap(chain)
