"""The compiled library as Python sees it: structures of csrc/loftq_cpu.h, instructions, threads."""

from __future__ import annotations

import ctypes
import os
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import torch

from loftq.ops.cpu.build import built_library

ABI = 3
ISAS = ("scalar", "neon", "avx2", "avx512")
"""Instruction sets by their number in the library, each better than those before."""
ISA = "LOFTQ_CPU_ISA"
"""Environment variable that asks for an instruction set; `none` = no library at all."""
DTYPES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}
SCALES = {"f32": 0, "f16": 1, "bf16": 2, "dq": 3}
BITS = (2, 3, 4, 8)
NOT_BUILT = "the CPU library is not built: `loftq doctor --build` compiles it once"


class Weight(ctypes.Structure):
    """loftq_weight."""

    _fields_ = (
        ("codes", ctypes.c_void_p), ("scales", ctypes.c_void_p), ("zeros", ctypes.c_void_p),
        ("nested", ctypes.c_void_p), ("map", ctypes.c_void_p),
        ("rows", ctypes.c_int64), ("columns", ctypes.c_int64),
        ("bits", ctypes.c_int32), ("group", ctypes.c_int32), ("scale_coding", ctypes.c_int32),
        ("has_levels", ctypes.c_int32), ("default_zero", ctypes.c_float),
        ("levels", ctypes.c_float * 16),
    )  # fmt: skip


class Adapter(ctypes.Structure):
    """loftq_adapter."""

    _fields_ = (
        ("a", ctypes.c_void_p), ("b", ctypes.c_void_p), ("rank", ctypes.c_int64),
        ("dtype", ctypes.c_int32), ("scaling", ctypes.c_float),
    )  # fmt: skip


class Projection(ctypes.Structure):
    """loftq_projection."""

    _fields_ = (
        ("weight", Weight), ("adapter", Adapter), ("bias", ctypes.c_void_p),
        ("bias_dtype", ctypes.c_int32),
    )  # fmt: skip


class Grid(ctypes.Structure):
    """loftq_grid."""

    borrowed: object = None
    """What its pointers lead to, as long as it lives."""
    _fields_ = (
        ("levels", ctypes.c_void_p), ("ratios", ctypes.c_void_p), ("columns", ctypes.c_int64),
        ("top", ctypes.c_int32), ("ratio_count", ctypes.c_int32), ("shifts", ctypes.c_int32),
        ("tiny", ctypes.c_float),
    )  # fmt: skip


class Team(ctypes.Structure):
    """loftq_team."""

    _fields_ = (("isa", ctypes.c_int32), ("threads", ctypes.c_int32), ("fork", ctypes.c_void_p))


@dataclass(frozen=True)
class Library:
    """The loaded library and what this CPU can do of it."""

    path: Path
    functions: ctypes.CDLL
    isas: tuple[str, ...]
    """Names of the instruction sets that can be asked for, the best last."""

    def check(self, result: int) -> None:
        """Raise for a result that is not success."""
        if result == 1:
            raise MemoryError("the CPU library found no memory for its scratch space")
        assert result == 0, f"the CPU library refused a call that was checked: result {result}"


@lru_cache
def load_library(path: Path) -> Library:
    """Load a library.

    Raises:
        OSError: it cannot be loaded, or speaks another version of the interface.
    """
    functions = ctypes.CDLL(str(path))
    if functions.loftq_abi() != ABI:
        raise OSError(f"{path}: interface {functions.loftq_abi()}, expected {ABI}")
    pointer, number, count = ctypes.c_void_p, ctypes.c_int32, ctypes.c_int64
    functions.loftq_project.argtypes = (
        pointer, pointer, number, pointer, count, number, pointer,
    )  # fmt: skip
    functions.loftq_dequantize.argtypes = (pointer, pointer, number, pointer)
    functions.loftq_step.argtypes = (pointer, pointer, count, pointer, pointer)
    functions.loftq_fit.argtypes = (pointer, pointer, pointer, count, pointer, pointer)
    functions.loftq_round.argtypes = (pointer, pointer, pointer, count, *[pointer] * 4)
    functions.loftq_pack.argtypes = (pointer, pointer, count, count, number, pointer)
    mask = functions.loftq_isas()
    return Library(path, functions, tuple(n for i, n in enumerate(ISAS) if mask >> i & 1))


@lru_cache
def find_library() -> Library | None:
    """The library if it is built and gave the right values in a trial, else None."""
    path = built_library()
    if path is None or _why_refused(path):
        return None
    return load_library(path)


def why_no_library() -> str:
    """Reason that no product runs in the library; "" if one does."""
    if os.environ.get(ISA) == "none":
        return f"{ISA}=none asks for plain PyTorch"
    if find_library() is not None:
        return ""
    path = built_library()
    return NOT_BUILT if path is None else _why_refused(path)


@lru_cache
def _why_refused(path: Path) -> str:
    try:
        library = load_library(path)
    except OSError as error:
        return f"the CPU library does not load: {error}. Run `loftq doctor --build` again"
    from loftq.ops.cpu.probe import values_are_right

    wrong = [name for name in library.isas if not values_are_right(library, name)]
    if not wrong:
        return ""
    return f"a trial of the CPU library gave wrong values with {', '.join(wrong)}: report it"


def forget_library() -> None:
    """Look for the library again at its next use, after one was built."""
    find_library.cache_clear()
    _why_refused.cache_clear()


def current_isa(library: Library) -> str:
    """The instruction set that products use: the best, or that of LOFTQ_CPU_ISA.

    Raises:
        ValueError: one is asked for that this CPU or this library does not have.
    """
    asked = os.environ.get(ISA)
    if not asked:
        return library.isas[-1]
    if asked not in library.isas:
        choices = ", ".join((*library.isas, "none"))
        raise ValueError(f"{ISA}={asked}: this CPU has {choices}. Unset it for the best.")
    return asked


@lru_cache
def openmp_fork() -> int | None:
    """Address of GOMP_parallel in the OpenMP runtime that torch has loaded, or None.

    The library runs in torch's own team of threads. A team of its own would compete with torch's,
    whose threads stay awake for a while after each operator.
    """
    try:
        return ctypes.cast(ctypes.CDLL(None).GOMP_parallel, ctypes.c_void_p).value
    except (AttributeError, OSError, TypeError):
        return None


@lru_cache
def make_team(isa: str, threads: int) -> Team:
    """Who works: at most `threads` threads with one instruction set."""
    return Team(ISAS.index(isa), threads, openmp_fork())


def current_team(library: Library) -> Team:
    """As many threads as torch uses, with the current instruction set."""
    return make_team(current_isa(library), torch.get_num_threads())


def ready() -> tuple[Library, Team]:
    """The library and who works in it, where the dispatcher found that there is one."""
    library = find_library()
    assert library is not None, "the dispatcher asks first"
    return library, current_team(library)


@lru_cache
def level_array(levels: tuple[float, ...]) -> ctypes.Array[ctypes.c_float]:
    """Codebook of a Weight, filled up with zeros."""
    return (ctypes.c_float * 16)(*levels)


def make_weight(
    pointers: Sequence[int | None],
    shape: tuple[int, int],
    bits: int,
    group_size: int,
    scale_coding: str,
    levels: tuple[float, ...],
    default_zero: float,
) -> Weight:
    """A Weight; `pointers` are those of codes, scales, zeros, nested constants and their map."""
    return Weight(
        *pointers, *shape, bits, group_size, SCALES[scale_coding], bool(levels), default_zero,
        level_array(levels),
    )  # fmt: skip
