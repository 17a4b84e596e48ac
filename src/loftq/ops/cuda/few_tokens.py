"""The few-token product in CUDA C++ (few_tokens.cu): definitions, launch shape, arguments."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from loftq.ops.cuda.compiler import Kernel, kernel, room
from loftq.ops.reference import SCALE_DTYPES, dynamic_map_on, view_bytes

SOURCE = "few_tokens.cu"
SCALES = {"dq": 0, "f16": 1, "bf16": 2, "f32": 3}
DOWN_COLUMNS = 1024  # of x A^T in one block of `down`


class Weight(ctypes.Structure):
    """decode.cuh's."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in (
            "packed", "scale", "zero", "nested", "map", "levels")),
        *((name, ctypes.c_int) for name in (
            "rows", "columns", "groups", "row_bytes", "zero_row_bytes")),
    )  # fmt: skip


class _Arguments(ctypes.Structure):
    _fields_ = (
        ("weight", Weight),
        *((name, ctypes.c_void_p) for name in ("x", "ax", "b", "y")),
        *((name, ctypes.c_int) for name in ("tokens", "rank", "share", "slabs", "parts")),
    )


@dataclass(frozen=True, kw_only=True)
class Launch:
    """Shape of one launch."""

    warps: int
    """Warps of a block: each has tiles of its own."""
    slab: int
    """Rows that a warp decodes together: 16 or 32."""
    tokens: int
    """Tokens of a block: 8, 16 or 32."""
    ahead: int
    """Tiles of a warp on their way."""


def choose_launch(tokens: int) -> Launch:
    """Chosen by registers and bytes on their way; not measured (benchmarks/ops/sweep_linear.py)."""
    if tokens <= 8:
        return Launch(warps=16, slab=32, tokens=8, ahead=2)
    if tokens <= 16:
        return Launch(warps=16, slab=32, tokens=16, ahead=1)
    return Launch(warps=8, slab=32, tokens=32, ahead=1)


def few_tokens(
    x: Tensor,
    packed: Tensor,
    scale: Tensor,
    zero: Tensor | None,
    nested: Tensor | None,
    bits: int,
    group_size: int,
    scale_coding: str,
    levels: Sequence[float],
    default_zero: float,
    lora_A: Tensor | None = None,
    lora_B: Tensor | None = None,
    scaling: float = 1.0,
    *,
    launch: Launch | None = None,
    overlap: bool | None = None,
) -> Tensor:
    """x W^T (+ scaling x A^T B^T) for x (tokens, in_features), float16 or bfloat16.

    Arguments as in `schema.quant_linear`; dispatch.py says what is held. `overlap`: start while the
    kernel before it runs; default: while a graph is captured, in which weights do not change.
    """
    x = x.contiguous()
    (tokens, columns), rows = x.shape, packed.shape[0]
    y = torch.empty((tokens, rows), dtype=x.dtype, device=x.device)
    if not y.numel():
        return y
    launch = launch or choose_launch(tokens)
    overlap = torch.cuda.is_current_stream_capturing() if overlap is None else overlap
    minus = 0.0 if zero is not None else default_zero
    values = tuple(levels) or tuple(code - minus for code in range(2**bits))
    scales = scale if nested is not None else view_bytes(scale, SCALE_DTYPES[scale_coding])
    definitions = _definitions(
        bits, x.dtype, group_size, scale_coding, zero is not None, lora_A is not None, launch
    )
    share, shared = _share(rows, min(tokens, launch.tokens), bits, launch, x.device)
    parts, rank = -(-columns // DOWN_COLUMNS), 0
    with torch.cuda.device_of(x):
        ax = x
        if lora_A is not None and lora_B is not None:
            rank = lora_A.shape[0]
            lora_A, lora_B = (t.to(x.dtype).contiguous() for t in (lora_A, lora_B))
            ax = torch.empty((parts, tokens, rank), dtype=torch.float32, device=x.device)
            kernel(SOURCE, "down", definitions, x.device)(
                (-(-rank // 16), parts, -(-tokens // 8)), 256,
                (*map(_pointer, (x, lora_A, ax)), *map(ctypes.c_int, (tokens, columns, rank)),
                 ctypes.c_float(scaling)),
                shared=4096, overlap=overlap,
            )  # fmt: skip
        weight = Weight(
            *(t.data_ptr() for t in (
                packed, scales, packed if zero is None else zero,
                packed if nested is None else nested, dynamic_map_on(x.device),
                _levels_on(values, x.dtype, x.device))),
            rows, columns, scales.shape[-1], packed.shape[1], 0 if zero is None else zero.shape[1],
        )  # fmt: skip
        arguments = _Arguments(
            weight, *(t.data_ptr() for t in (x, ax, x if lora_B is None else lora_B, y)),
            tokens, rank, share, -(-share // launch.slab), parts,
        )  # fmt: skip
        run: Kernel = kernel(SOURCE, "few_tokens", definitions, x.device)
        grid = (-(-rows // share), -(-tokens // launch.tokens), 1)
        run(grid, launch.warps * 32, (arguments,), shared=shared, overlap=overlap)
    return y


def _pointer(tensor: Tensor) -> ctypes.c_void_p:
    return ctypes.c_void_p(tensor.data_ptr())


def _definitions(
    bits: int, dtype: torch.dtype, group_size: int, coding: str, zeros: bool, ranked: bool,
    launch: Launch,
) -> tuple[tuple[str, int], ...]:  # fmt: skip
    return (
        ("BITS", bits), ("HALF", int(dtype == torch.float16)), ("GROUP", group_size),
        ("SCALE", SCALES[coding]), ("ZEROS", int(zeros)), ("RANKED", int(ranked)),
        ("WAIT_EARLY", int(not ranked)), ("WARPS", launch.warps), ("SLAB", launch.slab),
        ("TOKENS", launch.tokens), ("AHEAD", launch.ahead),
    )  # fmt: skip


def _share(
    rows: int, tokens: int, bits: int, launch: Launch, device: torch.device
) -> tuple[int, int]:
    """Rows of a block and its bytes of shared memory: as many blocks as multiprocessors, or a
    multiple where the sums of all warps would not fit."""
    blocks, most_bytes = room(device)
    fixed = (64 * 256 if bits == 3 else 65536) + 1024
    row_bytes = launch.warps * tokens * 4
    most = (most_bytes - fixed) // row_bytes
    waves = -(-rows // (blocks * most))
    share = -(-rows // (blocks * waves))
    return share, fixed + share * row_bytes


@lru_cache
def _levels_on(levels: tuple[float, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Levels in the 16-bit dtype of x."""
    return torch.tensor(levels, dtype=torch.float32).to(device, dtype)
