"""Building, finding and choosing the CPU library; what is said where it cannot be used."""

import os
import stat

import pytest
import torch

from loftq.ops import quant_linear
from loftq.ops.cpu import build
from loftq.ops.cpu.build import BuildError, build_library, built_library
from loftq.ops.cpu.library import ISA, NOT_BUILT, find_library, forget_library, why_no_library
from loftq.ops.cpu.probe import values_are_right
from loftq.ops.dispatch import (
    LARGE_WEIGHT,
    MOST_TOKENS_CPU,
    MOST_TOKENS_LARGE_CPU,
    small_linear_kernel,
    why_no_small_linear,
)
from loftq.ops.reference import dequantize_reference

CODES = torch.zeros(2, 32, dtype=torch.uint8)
WEIGHT = (CODES, torch.ones(2, 1).view(torch.uint8), None, None)
LAYOUT = (4, 64, "f32", tuple(float(i) for i in range(16)), 0.0)


@pytest.fixture
def empty_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("LOFTQ_CACHE", str(tmp_path))
    monkeypatch.delenv(ISA, raising=False)
    forget_library()
    yield tmp_path
    forget_library()


def program(path, text):
    """An executable script."""
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(path.stat().st_mode | stat.S_IXUSR)
    return str(path)


def test_without_a_library_the_reference_computes_and_the_reason_is_said(empty_cache):
    x = torch.ones(1, 64)
    assert find_library() is None
    assert why_no_library() == NOT_BUILT
    assert why_no_small_linear(x, CODES, 4, 64) == NOT_BUILT
    assert small_linear_kernel(x, CODES, 4, 64) is None
    W = dequantize_reference(*WEIGHT, 64, *LAYOUT, torch.float32)
    assert torch.equal(quant_linear(x, *WEIGHT, *LAYOUT), x @ W.T)


def test_a_library_is_built_once_and_found_by_its_sources(library, built_cache, monkeypatch):
    path = build_library()
    assert path == built_library() == library.path
    assert path.name.startswith(build.sources_hash())
    assert list(path.parent.glob("*.so")) == [path]
    monkeypatch.setattr(build, "_compile", None)  # a second build compiles nothing
    assert build_library() == path
    monkeypatch.setattr(build, "sources_hash", lambda: "of other sources")
    assert built_library() is None


def test_a_build_without_a_compiler_says_what_to_install(empty_cache, monkeypatch):
    monkeypatch.setenv("PATH", str(empty_cache))
    monkeypatch.delenv("CXX", raising=False)
    with pytest.raises(BuildError, match=r"none of c\+\+, g\+\+, clang\+\+ exists. Install one"):
        build_library()
    monkeypatch.setenv("CXX", "nothing++")
    with pytest.raises(BuildError, match=r"CXX=nothing\+\+ is not a program"):
        build_library()
    assert why_no_library() == NOT_BUILT


def test_a_compiler_that_fails_is_quoted_and_leaves_nothing(empty_cache, monkeypatch):
    text = 'test "$1" = --version || { echo "x.cpp:1: error: no such flag" >&2; exit 1; }'
    monkeypatch.setenv("CXX", program(empty_cache / "c++", text))
    with pytest.raises(BuildError, match=r"x\.cpp:1: error: no such flag"):
        build_library()
    assert os.listdir(empty_cache / "cpu") == []


def test_a_folder_that_cannot_be_written_is_named(empty_cache, monkeypatch):
    monkeypatch.setenv("CXX", program(empty_cache / "c++", "exit 0"))
    monkeypatch.setenv("LOFTQ_CACHE", str(empty_cache / "c++"))  # a file
    with pytest.raises(BuildError, match="Set LOFTQ_CACHE to a folder that can be written"):
        build_library()


def test_a_file_that_is_no_library_is_refused_with_the_reason(empty_cache):
    place = empty_cache / "cpu" / f"{build.sources_hash()}-x-{build.machine()}.so"
    place.parent.mkdir()
    place.write_bytes(b"not a library")
    assert find_library() is None
    assert "does not load" in why_no_library()
    assert "loftq doctor --build" in why_no_library()


def test_a_library_with_wrong_values_is_refused(library, monkeypatch):
    monkeypatch.setattr(
        "loftq.ops.cpu.probe.values_are_right", lambda library, isa: isa == "scalar"
    )
    forget_library()
    if others := ", ".join(isa for isa in library.isas if isa != "scalar"):
        assert find_library() is None
        assert f"wrong values with {others}" in why_no_library()


def test_the_trial_notices_wrong_values(library, monkeypatch):
    assert values_are_right(library, "scalar")
    from loftq.ops.cpu import probe

    monkeypatch.setitem(probe.LEVELS, 4, tuple(i / 8 for i in range(16)))
    right = probe.dequantize_reference
    monkeypatch.setattr(
        probe,
        "dequantize_reference",
        lambda *arguments: right(*arguments).nextafter(torch.ones(())),
    )
    assert not values_are_right(library, "scalar")


def test_instructions_are_chosen_by_name(library, monkeypatch):
    from loftq.ops.cpu.library import current_isa

    assert current_isa(library) == library.isas[-1]
    monkeypatch.setenv(ISA, "scalar")
    assert current_isa(library) == "scalar"
    monkeypatch.setenv(ISA, "avx1024")
    with pytest.raises(ValueError, match=r"LOFTQ_CPU_ISA=avx1024: this CPU has scalar.*none"):
        quant_linear(torch.ones(1, 64), *WEIGHT, *LAYOUT)
    monkeypatch.setenv(ISA, "none")
    assert why_no_library() == "LOFTQ_CPU_ISA=none asks for plain PyTorch"


def test_the_dispatcher_says_why_a_weight_is_dequantized(library):
    x = torch.zeros(3, 64, dtype=torch.bfloat16)
    assert why_no_small_linear(x, CODES, 4, 64) == ""
    assert "torch.float64" in why_no_small_linear(x.double(), CODES, 4, 64)
    assert "whole tensor" in why_no_small_linear(x, CODES, 4, -1)
    many = torch.zeros(MOST_TOKENS_CPU + 1, 64)
    assert f"above {MOST_TOKENS_CPU}" in why_no_small_linear(many, CODES, 4, 64)
    large = CODES[:1].expand(LARGE_WEIGHT // 64, -1)
    assert why_no_small_linear(many, large, 4, 64) == ""
    more = torch.zeros(MOST_TOKENS_LARGE_CPU + 1, 64)
    assert f"above {MOST_TOKENS_LARGE_CPU}" in why_no_small_linear(more, large, 4, 64)
