"""The CPU library against the reference, with each instruction set that this CPU has."""

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from loftq.formats import parse_format
from loftq.ops import dequantize, quant_linear, quant_linear_lora
from loftq.ops.cpu.library import ISA
from loftq.ops.cpu.linear import dequantize as in_library
from loftq.ops.cpu.linear import small_linear
from loftq.ops.reference import dequantize_reference
from packed_folder import random_quantized
from tolerances import FLOAT32_ROUNDING, KERNEL_ERROR_RATIO

FORMATS = (
    "nf4", "nf3", "nf2", "nf4-g16-f16", "nf3-g128-bf16", "nf2-g256-f32", "snf3-channel-f32",
    "even2-g32", "iq4nl", "int4-g32", "int3", "int2-g16", "int3-channel-bf16", "sint4-g128-f16",
    "sint2", "sint8", "int8-g32-f16",
)  # fmt: skip
SHAPES = ((33, 256, 3), (17, 37, 1), (5, 1, 2), (20, 63, 9), (130, 576, 1), (2, 4097, 7))
"""Rows, columns, tokens."""
DTYPES = (torch.float32, torch.float16, torch.bfloat16)


@pytest.fixture(autouse=True)
def poisoned():
    """Every uninitialised tensor is full of NaN."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    assert torch.utils.deterministic.fill_uninitialized_memory
    yield
    torch.use_deterministic_algorithms(False)


def packed(name, rows, columns):
    """(packed tensors, layout) of a random weight."""
    spec, q = parse_format(name), random_quantized(rows, columns, name)
    stored = (q.weight_packed, q.weight_scale, q.weight_zero, q.weight_nested)
    return stored, (spec.bits, spec.group_size, spec.scale_coding, spec.levels, spec.default_zero)


def check_product(stored, layout, x, adapter=()):
    """At most twice the error of the dense product, which rounds W to x's dtype."""
    W = dequantize_reference(*stored, x.shape[1], *layout, torch.float32)
    exact, plain = x.double() @ W.double().T, x @ W.to(x.dtype).T
    if adapter:
        A, B, scaling = adapter
        exact = exact + scaling * (x.double() @ A.double().T) @ B.double().T
        plain = plain + scaling * (x @ A.to(x.dtype).T) @ B.to(x.dtype).T
    error = (small_linear(x, *stored, *layout, *adapter).double() - exact).norm()
    allowed = KERNEL_ERROR_RATIO * (plain.double() - exact).norm()
    # A dense float32 product of a few numbers may be exact by luck.
    floor = FLOAT32_ROUNDING * exact.norm() if x.dtype is torch.float32 else 0.0
    assert error <= max(allowed, floor)


@pytest.mark.parametrize("name", FORMATS)
def test_weights_are_those_of_the_reference_to_the_bit(isa, name):
    for rows, columns, _ in SHAPES:
        stored, layout = packed(name, rows, columns)
        for dtype in (*DTYPES, torch.float64):
            wanted = dequantize_reference(*stored, columns, *layout, dtype)
            assert torch.equal(in_library(*stored, columns, *layout, dtype), wanted)


@pytest.mark.parametrize("name", FORMATS)
def test_products_are_as_exact_as_the_dense_one(isa, name, generator):
    for rows, columns, tokens in SHAPES:
        stored, layout = packed(name, rows, columns)
        x = torch.randn(tokens, columns, generator=generator)
        A, B = (torch.randn(s, generator=generator) for s in ((5, columns), (rows, 5)))
        for dtype in DTYPES:
            check_product(stored, layout, x.to(dtype))
            check_product(stored, layout, x.to(dtype), (A, B, 0.5))


@pytest.mark.parametrize("rank", [1, 16, 33])
@pytest.mark.parametrize("dtype", DTYPES)
def test_adapters_of_any_rank_and_dtype(isa, rank, dtype, generator):
    stored, layout = packed("nf3", 21, 75)
    x = torch.randn(5, 75, generator=generator)
    A, B = (torch.randn(s, generator=generator).to(dtype) for s in ((rank, 75), (21, rank)))
    check_product(stored, layout, x, (A, B, -0.3))
    check_product(stored, layout, x.bfloat16(), (A, B, -0.3))


def test_numbers_at_the_ends_of_a_dtype_are_rounded_as_torch_does(isa):
    scales = torch.tensor(
        [6.1e4, 65519.9, 65520.0, 3.4e38, 6e-8, 2.9e-8, 1e-40, torch.nan, torch.inf]
    )
    scales = torch.cat([scales, 1 + torch.arange(64) * 2.0**-12])[:, None]
    codes = torch.full((len(scales), 9), 0b11100100, dtype=torch.uint8)  # 0 1 2 3 0 1 2 3 ...
    arguments = (
        codes,
        scales.view(torch.uint8),
        None,
        None,
        36,
        2,
        0,
        "f32",
        (-1.0, 0.5, 1.0, 2.0),
        0.0,
    )
    for dtype in DTYPES:
        found, wanted = in_library(*arguments, dtype), dequantize_reference(*arguments, dtype)
        assert torch.equal(found.isnan(), wanted.isnan())
        assert torch.equal(found.nan_to_num(7.0), wanted.nan_to_num(7.0))


@pytest.mark.parametrize("name", ["nf4", "int3-g16"])
def test_a_result_depends_neither_on_threads_nor_on_other_tokens(isa, name, generator):
    stored, layout = packed(name, 700, 320)
    x = torch.randn(7, 320, generator=generator)
    A, B = (torch.randn(s, generator=generator) for s in ((40, 320), (700, 40)))
    wanted = small_linear(x, *stored, *layout, A, B, 2.0)
    for token in range(7):
        alone = small_linear(x[token : token + 1], *stored, *layout, A, B, 2.0)
        assert torch.equal(alone[0], wanted[token])
    before = torch.get_num_threads()
    try:
        for threads in (2, 3):
            torch.set_num_threads(threads)
            assert torch.equal(small_linear(x, *stored, *layout, A, B, 2.0), wanted)
            dense = in_library(*stored, 320, *layout, torch.bfloat16)
            assert torch.equal(dense, dequantize_reference(*stored, 320, *layout, torch.bfloat16))
    finally:
        torch.set_num_threads(before)


def test_several_threads_of_the_caller_may_ask_at_once(library, generator):
    stored, layout = packed("nf2", 300, 256)
    xs = [torch.randn(2, 256, generator=generator) for _ in range(32)]
    wanted = [small_linear(x, *stored, *layout) for x in xs]
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda x: small_linear(x, *stored, *layout), xs))
    assert all(torch.equal(a, b) for a, b in zip(found, wanted, strict=True))


@pytest.mark.parametrize("name", ["nf4-f32", "int3-dq", "sint2-f16"])
def test_bytes_may_start_anywhere_and_rows_may_end_where_memory_does(isa, name, generator):
    stored, layout = packed(name, 3, 200)
    x = torch.randn(1, 200, generator=generator)
    moved = []
    for part in stored:
        if part is not None:
            room = torch.full((part.numel() + 1,), 255, dtype=torch.uint8)
            room[1:] = part.flatten()
            part = room[1:].view(part.shape)
        moved.append(part)
    assert torch.equal(small_linear(x, *moved, *layout), small_linear(x, *stored, *layout))
    assert torch.equal(
        in_library(*moved, 200, *layout, torch.float32),
        in_library(*stored, 200, *layout, torch.float32),
    )


def test_the_operators_use_the_library_and_pass_opcheck(library, monkeypatch, generator):
    stored, layout = packed("int4", 24, 128)
    x = torch.randn(3, 128, generator=generator)
    adapter = (torch.randn(2, 128), torch.randn(24, 2), 0.5)
    found = quant_linear(x, *stored, *layout, inference=True)
    assert torch.equal(found, small_linear(x, *stored, *layout))
    assert torch.equal(
        quant_linear_lora(x[None], *stored, *layout, *adapter)[0],
        small_linear(x, *stored, *layout, *adapter),
    )
    torch.library.opcheck(quant_linear, (x, *stored, *layout, True))
    torch.library.opcheck(quant_linear_lora, (x, *stored, *layout, *adapter))
    torch.library.opcheck(dequantize, (*stored, 128, *layout, torch.bfloat16))


def test_a_gradient_flows_as_without_the_library(library, monkeypatch, generator):
    stored, layout = packed("nf4", 24, 128)
    x = torch.randn(3, 128, generator=generator, requires_grad=True)
    quant_linear(x, *stored, *layout).square().sum().backward()
    found, x.grad = x.grad, None
    monkeypatch.setenv(ISA, "none")
    quant_linear(x, *stored, *layout).square().sum().backward()
    assert torch.equal(found, x.grad)


def test_no_tokens_give_no_results(library):
    stored, layout = packed("nf4", 24, 128)
    assert small_linear(torch.zeros(0, 128), *stored, *layout).shape == (0, 24)
    assert quant_linear(torch.zeros(2, 0, 128), *stored, *layout).shape == (2, 0, 24)
