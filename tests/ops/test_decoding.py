"""Kernels of one decoded token against their definitions: interpreted here, compiled on a GPU.

The interpreter needs its variable before Triton is imported, hence a process of its own.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from loftq.ops import decoding
from loftq.ops.dispatch import may_overlap, why_no_decode_kernels
from loftq.ops.few_tokens import Member
from loftq.ops.groups import linears, why_not_together
from packed_product import Problem, Stacked, check_overlap
from tolerances import KERNEL_ERROR_RATIO

SHAPES = (  # tokens, heads, kv_heads, length, dim, position, bias, norms
    (1, 4, 4, 130, 32, 0, False, False), (3, 8, 2, 200, 64, 77, True, False),
    (1, 16, 1, 129, 128, 128, False, True), (2, 5, 5, 70, 256, 63, True, True),
)  # fmt: skip


def close(found, plain, exact):
    """Error against float64 at most twice PyTorch's in the same dtype, or one rounding."""
    exact = exact.double()
    allowed = KERNEL_ERROR_RATIO * (plain.double() - exact).norm()
    rounding = torch.finfo(found.dtype).eps / 2 * exact.norm()
    assert (found.double() - exact).norm() <= torch.maximum(allowed, rounding)


def check_elementwise(device, dtype):
    from loftq.ops.triton.decode_norm import add_norm, swiglu

    generator = torch.Generator().manual_seed(0)
    for tokens, columns in ((1, 64), (3, 37), (2, 4097)):
        shapes = ((tokens, columns), (tokens, columns), (columns,))
        x, delta, weight = (torch.randn(s, generator=generator) for s in shapes)
        x, delta, weight = (t.to(device, dtype) for t in (x, delta, weight))
        for added in (None, delta):
            total, y = add_norm(x, added, weight, 1e-6)
            wide = x.double() if added is None else total.double()
            exact = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + 1e-6) * weight
            plain = plainly(decoding.add_norm, x, added, weight, 1e-6)
            assert torch.equal(total, plain[0])
            close(y, plain[1], exact)
        x = torch.cat([x, delta], -1)
        exact = torch.nn.functional.silu(x[:, :columns].double()) * x[:, columns:].double()
        close(swiglu(x), plainly(decoding.swiglu, x), exact)


def plainly(function, *arguments):
    """The definition, whatever the device."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(decoding, "why_no_decode_kernels", lambda x: "the test asks for it")
        return function(*arguments)


def check_attention(device, dtype):
    for shape in SHAPES:
        check_attention_of(shape, device, dtype)


def check_attention_of(shape, device, dtype):
    from loftq.ops.triton.decode_attention import attend, rotate_and_store

    tokens, heads, kv_heads, length, dim, at, bias, norms = shape
    generator = torch.Generator().manual_seed(at)

    def draw(*size):
        return torch.randn(size, generator=generator).to(device, dtype)

    x = draw(tokens, (heads + 2 * kv_heads) * dim)
    b = draw(x.shape[1]) if bias else None
    cos, sin = draw(dim), draw(dim)
    weights = (draw(dim), draw(dim), 1e-6) if norms else None
    keys, values = (draw(tokens, kv_heads, length, dim) for _ in range(2))
    keys[:, :, at:], values[:, :, at:] = float("nan"), float("nan")  # nothing is there yet
    position = torch.tensor(at, device=device)

    def run(rotate, attention, wide):
        cache = [keys.to(wide), values.to(wide)]
        given = [None if t is None else t.to(wide) for t in (x, b, cos, sin)]
        scales = weights and (weights[0].to(wide), weights[1].to(wide), weights[2])
        q = rotate(*given, scales, *cache, position)
        live = [t.nan_to_num() for t in cache] if attention is decoding.attend else cache
        y = attention(q, *live, position, dim**-0.5)
        return q, cache[0][:, :, at], cache[1][:, :, at], y

    found = run(rotate_and_store, attend, dtype)
    plain, exact = (
        plainly(run, decoding.rotate_and_store, decoding.attend, kind)
        for kind in (dtype, torch.float64)
    )
    for parts in zip(found, plain, exact, strict=True):
        close(*parts)


def check_groups():
    import ptx
    from loftq.ops.triton.linear import small_linears

    ptx.teach_triton()
    for name in ("nf4", "nf3-f16", "int2"):
        members, problems = group(name, torch.float16, "cpu", (33, 16, 50))
        for adapter in (False, True):
            chosen = [m if adapter else Member(*m[:5]) for m in members]
            y = small_linears(problems[0].x, chosen)
            for problem, part in zip(problems, y.split((33, 16, 50), 1), strict=True):
                problem.check(part, adapter=adapter)


def check_stacked(device, dtype):
    """Tokens with adapters of their own in one launch are each as with its adapter alone."""
    from loftq.ops.triton.linear import small_linears

    if device == "cpu":
        import ptx

        ptx.teach_triton()
    for stacked, rank, tokens in ((2, 5, 2), (3, 16, 6), (5, 8, 5)):
        problems, members = stacks("nf4", dtype, device, stacked, rank, tokens)
        y = small_linears(problems[0].x, members)
        for problem, part in zip(problems, y.split((33, 16), 1), strict=True):
            problem.check(part, adapter=True)


def stacks(name, dtype, device, stacked, rank, tokens):
    """Two problems of one input whose tokens are dealt out to `stacked` adapters."""
    problems = [Stacked(name, n, 192, tokens, dtype, device, stacked * rank) for n in (33, 16)]
    for problem in problems:
        problem.stack(stacked)
    members = [Member(*p.packed[:4], p.packed[4:], *p.adapter, stacked) for p in problems]
    return problems, members


def check_trial():
    """The trial passes the kernels, and fails each one of them that is a little off."""
    from loftq.ops.triton import decode_probe as probe

    cpu = torch.device("cpu")
    assert probe.decoding_is_right(cpu)
    for name in ("add_norm", "swiglu", "rotate_and_store", "attend"):
        kernel = getattr(probe, name)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(probe, name, lambda *args, kernel=kernel: off(kernel(*args)))
            assert not probe.decoding_is_right(cpu), name


def off(y):
    """What a kernel gives, 10 % too large."""
    return 1.1 * y if isinstance(y, torch.Tensor) else tuple(1.1 * part for part in y)


def group(name, dtype, device, rows, tokens=3):
    """Members of one input, and a problem for each."""
    problems = [Problem(name, n, 192, tokens, dtype, device) for n in rows]
    members = [Member(*p.packed[:4], p.packed[4:], *p.adapter) for p in problems]
    return members, problems


@pytest.mark.parametrize(
    "check",
    ["check_elementwise", "check_attention", "check_groups", "check_stacked", "check_trial"],
)
def test_kernels_are_as_exact_as_pytorch_interpreted(check):
    pytest.importorskip("triton", reason="needs triton")
    arguments = "" if check in ("check_groups", "check_trial") else "'cpu', t.torch.float16"
    code = f"import test_decoding as t; t.{check}({arguments}); print('exact')"
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    environment["PYTHONPATH"] = os.pathsep.join([str(Path(__file__).parent), *sys.path])
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False
    )
    assert done.stdout.strip().endswith("exact"), done.stderr[-2000:]


def test_a_group_is_its_members_side_by_side():
    members, problems = group("nf4", torch.float32, "cpu", (33, 16))
    y = linears(problems[0].x, members)
    assert y.shape == (3, 49)
    for problem, part in zip(problems, y.split((33, 16), 1), strict=True):
        problem.check(part, adapter=True)


def test_stacked_adapters_are_each_for_its_own_tokens():
    problems, members = stacks("nf4", torch.float32, "cpu", 3, 4, 6)
    y = linears(problems[0].x, members)
    for problem, part in zip(problems, y.split((33, 16), 1), strict=True):
        problem.check(part, adapter=True)


def test_what_takes_a_launch_each_is_said():
    members, problems = group("nf4", torch.float16, "cpu", (16, 16))
    x = problems[0].x
    assert why_not_together(x, members) == "x is on cpu, where a launch costs nothing"
    assert "on cpu" in why_no_decode_kernels(x)
    assert "float32" in why_no_decode_kernels(x.float())
    assert not may_overlap(x.device)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_kernels_are_as_exact_as_pytorch(dtype, poisoned):
    assert why_no_decode_kernels(torch.ones(1, device="cuda", dtype=dtype)) == ""
    check_elementwise("cuda", dtype)
    check_attention("cuda", dtype)
    check_stacked("cuda", dtype)


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["nf4", "nf3-f16", "int2", "sint4-g128-bf16"])
@pytest.mark.parametrize("overlap", [False, True])
def test_a_group_is_exact_on_a_gpu(name, overlap, poisoned):
    from loftq.ops.triton.linear import small_linears

    if overlap and not may_overlap(torch.device("cuda")):
        pytest.skip("launches overlap from compute capability 9.0 on")
    for rows, tokens in (((330, 16, 50), 1), ((128, 256), 17)):
        members, problems = group(name, torch.bfloat16, "cuda", rows, tokens)
        assert why_not_together(problems[0].x, members) == ""
        y = small_linears(problems[0].x, members, overlap=overlap)
        for problem, part in zip(problems, y.split(rows, 1), strict=True):
            problem.check(part, adapter=True)


@pytest.mark.gpu
def test_overlapping_launches_in_a_graph_give_the_same_bits():
    """Each launch reads the last one's output: one that read too early would differ."""
    if not may_overlap(torch.device("cuda")):
        pytest.skip("launches overlap from compute capability 9.0 on")
    problem = Problem("nf4", 1024, 1024, 2, torch.bfloat16, "cuda", rank=64)
    members = [Member(*problem.packed[:4], problem.packed[4:], *problem.adapter)] * 2
    weight = torch.ones(1024, device="cuda", dtype=torch.bfloat16)

    def chain(overlap):
        x = problem.x
        for _ in range(30):
            x, h = decoding.add_norm(x, None, weight, 1e-6, overlap=overlap)
            h = decoding.swiglu(linears(h, members, overlap=overlap), overlap=overlap)
            _, x = decoding.add_norm(x, h, weight, 1e-6, overlap=overlap)
        return x

    check_overlap(chain)
