"""The few-token product in CUDA C++: its source on the CPU, its code on a GPU."""

import shutil
from dataclasses import replace

import pytest
import torch

from cuda_on_cpu import ROOM, Compiler
from loftq.ops import dispatch
from loftq.ops.cuda import few_tokens as module
from loftq.ops.cuda import plan, probe
from loftq.ops.cuda.few_tokens import few_tokens, why_not
from loftq.ops.cuda.plan import FewTokens, MoreTokens, Teams
from loftq.ops.few_tokens import Member
from packed_product import Problem, Stacked, check_overlap

CASES = (
    ("nf4", (37,), 256, 3, FewTokens(warps=2, slab=32, ahead=2, resident=2)),
    ("nf3", (17, 40), 512, 9, FewTokens(warps=1, slab=16, ahead=1, tokens=16)),
    ("nf2-f16", (40, 7, 33), 768, 1, FewTokens(warps=4, slab=16, ahead=3)),
    ("sint4-g128-bf16", (33,), 1280, 2, FewTokens(warps=2, slab=32, ahead=2)),
    ("sint3-g128-f32", (7,), 256, 16, FewTokens(warps=2, slab=16, ahead=1, tokens=16)),
    ("nf4-f32", (30, 5), 512, 8, FewTokens(warps=3, slab=16, ahead=3)),
    ("nf2", (10,), 4352, 1, FewTokens(warps=2, slab=16, ahead=2)),
    ("sint2-g256-f32", (20,), 512, 5, FewTokens(warps=2, slab=16, ahead=1)),
    ("nf4", (60, 21), 256, 17, MoreTokens(slabs=1, tokens=32)),
    ("nf3", (40,), 512, 64, MoreTokens(slabs=1, tokens=64)),
    ("snf3-bf16", (1,), 256, 1, FewTokens(warps=2, slab=16, ahead=1)),
    ("nf2-bf16", (60,), 512, 33, MoreTokens(slabs=2, slab=16, tokens=64)),
    ("nf4", (40, 9), 512, 16, MoreTokens(slabs=1, tokens=16)),
    ("nf4", (40, 9), 768, 20, Teams(slabs=1, slab=16, tokens=32, span=2)),
    ("nf3", (60,), 512, 33, Teams(slabs=1, slab=32, tokens=64)),
    ("nf2", (40, 7, 33), 768, 5, FewTokens(warps=3, slab=32, ahead=1, early=True)),
)  # fmt: skip


@pytest.fixture(scope="module")
def compiler(tmp_path_factory):
    if shutil.which("g++") is None:
        pytest.skip("needs g++ with C++20")
    return Compiler(tmp_path_factory.mktemp("cuda"))


def problems(name, sizes, columns, tokens, dtype, device, rank=8):
    """Members of one input, and what each is checked by."""
    made = [Problem(name, rows, columns, tokens, dtype, device, rank=rank) for rows in sizes]
    for problem in made:
        assert torch.equal(problem.x, made[0].x)
    return made


def members(made, dtype):
    """dtype: of the adapters, None for none."""
    given = [Member(*p.stored, p.packed[4:], *p.adapter) for p in made]
    if dtype is None:
        return [Member(*m[:5]) for m in given]
    return [m._replace(lora_A=m.lora_A.to(dtype), lora_B=m.lora_B.to(dtype)) for m in given]


def check(y, made, adapter):
    for part, problem in zip(y.split([len(p.lora_B) for p in made], -1), made, strict=True):
        problem.check(part, adapter=adapter)


@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case[0]}-{case[3]}")
def test_the_source_is_as_exact_as_the_dense_product(case, compiler, monkeypatch):
    number = CASES.index(case)
    dtype = (torch.bfloat16, torch.float16)[number % 2]
    monkeypatch.setattr(module, "kernel", compiler)
    for user in (module, plan):
        monkeypatch.setattr(user, "room", lambda device: ROOM)
    *shape, launch = case
    made = problems(*shape, dtype, "cpu", rank=24)
    for adapter in (None, torch.float32 if number % 3 else dtype):
        y = few_tokens(made[0].x, members(made, adapter), launch=launch, overlap=False)
        check(y, made, adapter is not None)


def test_adapters_added_up_early_give_the_same_bits(compiler, monkeypatch):
    for user in (module, plan):
        monkeypatch.setattr(user, "room", lambda device: ROOM)
    monkeypatch.setattr(module, "kernel", compiler)
    made = problems("nf4", (50, 20), 768, 3, torch.bfloat16, "cpu", rank=72)
    given = members(made, torch.bfloat16)
    launch = FewTokens(warps=2, slab=16, ahead=1)
    early, late = (
        few_tokens(made[0].x, given, launch=shape, overlap=False)
        for shape in (replace(launch, early=True), launch)
    )
    check(early, made, True)
    assert torch.equal(early, late)


def test_stacked_adapters_are_each_for_their_own_tokens(compiler, monkeypatch):
    for user in (module, plan):
        monkeypatch.setattr(user, "room", lambda device: ROOM)
    monkeypatch.setattr(module, "kernel", compiler)
    made = [Stacked("nf4", n, 512, 6, torch.float16, "cpu", rank=24) for n in (33, 16)]
    for problem in made:
        problem.stack(3)
    given = [m._replace(stacked=3) for m in members(made, torch.float16)]
    assert why_not(made[0].x, given) == ""
    launch = FewTokens(warps=2, slab=16, ahead=1)
    check(few_tokens(made[0].x, given, launch=launch, overlap=False), made, True)


def test_a_trial_passes_the_product_and_fails_a_wrong_one(compiler, monkeypatch):
    monkeypatch.setattr(module, "kernel", compiler)
    for user in (module, plan):
        monkeypatch.setattr(user, "room", lambda device: ROOM)
    launches = (FewTokens(warps=2, slab=16, ahead=2), MoreTokens(slabs=1, tokens=64))
    monkeypatch.setattr(module, "LAUNCHES", launches)
    for tokens in (8, 64):
        assert probe.product_is_right(torch.device("cpu"), tokens=tokens)
    monkeypatch.setattr(
        probe, "few_tokens", lambda x, members, overlap: 1.1 * few_tokens(x, members)
    )
    assert not probe.product_is_right(torch.device("cpu"), tokens=8)


def test_what_it_does_not_hold_is_said(monkeypatch):
    for user in (module, plan):
        monkeypatch.setattr(user, "room", lambda device: ROOM)
    x = torch.zeros(3, 512, dtype=torch.bfloat16)

    def reason(name="nf4", x=x, rows=20, rank=8, dtype=torch.bfloat16):
        made = problems(name, (rows,), x.shape[1], len(x), dtype, "cpu", rank=rank)
        return why_not(x, members(made, dtype))

    assert reason() == ""
    assert "has zeros" in reason("int4")
    assert "groups of 32" in reason("nf4-g32")
    assert "less than a word" in reason("nf4-g128")
    assert "in_features=320" in reason(x=x[:, :320])
    assert "65 tokens" in reason(x=x[:1].expand(65, -1))
    assert "x is not aligned" in reason(x=torch.zeros(513, dtype=x.dtype)[1:].view(1, 512))
    assert "rank 12" in reason(rank=12)
    assert "torch.float16 beside torch.bfloat16" in reason(dtype=torch.float16)
    assert "does not fit" in reason(rows=40000, rank=512)


def test_the_dispatcher_says_why_triton_computes_it(monkeypatch):
    x = torch.zeros(65, 512, dtype=torch.bfloat16)
    given = members(problems("nf4", (20,), 512, 9, x.dtype, "cpu"), None)
    assert dispatch.why_no_cuda_product(x, given) == "cpu is no NVIDIA GPU"
    monkeypatch.setattr(dispatch, "_why_no_cuda_here", lambda device: "")
    trials = set()
    monkeypatch.setattr(dispatch, "why_no_cuda", lambda device, tokens: trials.add(tokens) or "")
    monkeypatch.setattr(plan, "room", lambda device: ROOM)
    monkeypatch.setattr(dispatch, "MORE_CUDA_ROWS", 20)
    ahead = {tokens for tokens in range(66) if not dispatch.why_no_cuda_product(x[:tokens], given)}
    assert ahead == {*range(1, 9), *range(17, 65)}
    assert trials == {8, 64}, "a trial of each source, and none for what Triton takes"
    reason = "9 tokens: CUDA C++ was measured ahead at 1 to 8 and 17 to 64"
    assert dispatch.why_no_cuda_product(x[:9], given) == reason
    assert "in_features=320" in dispatch.why_no_cuda_product(x[:8, :320], given)


def test_many_tokens_are_cuda_s_only_where_a_row_shows_it_ahead(monkeypatch):
    monkeypatch.setattr(dispatch, "_why_no_cuda_here", lambda device: "")
    monkeypatch.setattr(dispatch, "why_no_cuda", lambda device, tokens: "")
    monkeypatch.setattr(module, "why_not", lambda x, members: "")
    x = torch.zeros(64, 512, dtype=torch.bfloat16)

    def reason(name, rows):
        given = members(problems(name, (rows,), 512, 64, x.dtype, "cpu"), None)
        return dispatch.why_no_cuda_product(x, given)

    assert reason("nf4", 11008) == ""
    assert "64 tokens, 3 bits, 11008 rows: above 8" in reason("nf3", 11008)
    assert "4 bits, 4096 rows: above 8 tokens CUDA C++ was measured" in reason("nf4", 4096)


FORMATS = ("nf4", "nf3", "nf2", "nf4-g128-f32", "nf3-g256-f32", "nf2-f16", "snf3-bf16",
           "sint4-g128-f16", "sint2-g128-bf16")  # fmt: skip
SHAPES = (
    ((1,), 256, 1),
    ((640, 100), 11008, 16),
    ((4096, 1024, 1025), 2048, 8),
    ((4097,), 512, 64),
    ((11008, 1), 512, 17),
)


@pytest.mark.gpu
@pytest.mark.parametrize("name", FORMATS)
def test_the_product_is_as_exact_as_the_dense_one_and_the_same_each_time(name, poisoned):
    dtype = torch.float16 if FORMATS.index(name) % 2 else torch.bfloat16
    for shape in SHAPES:
        made = problems(name, *shape, dtype, "cuda", rank=16)
        for adapter in (None, dtype):
            given = members(made, adapter)
            assert why_not(made[0].x, given) == ""
            y = few_tokens(made[0].x, given)
            check(y, made, adapter is not None)
            assert torch.equal(y, few_tokens(made[0].x, given))


@pytest.mark.gpu
@pytest.mark.parametrize("rank", [8, 64, 296])
def test_any_rank_that_is_a_multiple_of_8(rank, poisoned):
    made = problems("nf4", (130,), 2304, 9, torch.bfloat16, "cuda", rank=rank)
    for dtype in (torch.bfloat16, torch.float32):
        check(few_tokens(made[0].x, members(made, dtype)), made, True)


@pytest.mark.gpu
def test_overlapping_launches_in_a_graph_give_the_same_bits():
    """Each product reads the last one's output: a launch that read too early would differ."""
    made = problems("nf4", (1024,), 1024, 4, torch.bfloat16, "cuda", rank=64)

    def chain(overlap):
        x = made[0].x
        for step in range(40):
            x = few_tokens(x, members(made, torch.bfloat16 if step % 3 else None), overlap=overlap)
            x = x / x.abs().max() if step % 5 == 4 else x
        return x

    check_overlap(chain)
