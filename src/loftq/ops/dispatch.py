"""Which implementation runs, and why."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Callable, Sequence
from functools import lru_cache, partial
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from loftq.ops.cpu.library import why_no_library
from loftq.ops.reference import PER_TENSOR

MOST_TOKENS = 64
"""Tokens that the packed product takes; up to here it beat dequantize + BLAS (docs/kernels.md)."""
MOST_TOKENS_FUSED = MOST_TOKENS
"""Tokens that the fused product (ops/triton/many_tokens.py) takes: no more, as no card ran it yet;
benchmarks/ops/sweep_many_tokens.py decides."""
CUDA_TOKENS, MORE_CUDA_TOKENS = range(1, 9), range(17, MOST_TOKENS + 1)
"""Tokens that it takes in CUDA C++ (few_tokens.cu, more_tokens.cu), where that was measured ahead
of Triton (docs/kernels.md)."""
MORE_CUDA_BITS, MORE_CUDA_ROWS = 4, 11008
"""What more_tokens.cu was measured with: bits, and rows of all weights together, or more."""
MOST_TOKENS_CPU, MOST_TOKENS_LARGE_CPU = 16, 64
"""The same on a CPU (benchmarks/results/cpu.md), and for weights of at least LARGE_WEIGHT."""
LARGE_WEIGHT = 1 << 22
"""Weights whose dense copy is fresh memory each time: its first touch costs more than decoding."""

LEVELS_CPU = (4, 8, 16)
"""Levels of a codebook that the CPU library rounds to."""

LONGEST_ROW = 16384
"""Columns of a row that a norm holds in registers."""

MOST_COLUMNS = 256
"""Columns that a sweep over columns holds in registers: a row of the longest group."""


def search_kernel(x: Tensor) -> Callable[[Tensor, Tensor, Tensor, Tensor], Tensor] | None:
    """The Triton scale search where it applies to rows `x`, else None for plain PyTorch."""
    if why_no_search_kernel(x):
        return None
    from loftq.ops.triton.scale_search import search_scales

    return search_scales


def integer_search_kernel(x: Tensor) -> Callable[..., tuple[Tensor, Tensor]] | None:
    """The Triton search of scale and zero where it applies to rows `x`, else None."""
    if why_no_search_kernel(x) or _why_no_integer_search(x.device):
        return None
    from loftq.ops.triton.scale_search import search_integer_scales

    return search_integer_scales


@lru_cache
def _why_no_integer_search(device: torch.device) -> str:
    from loftq.ops.triton.probe import integer_search_is_right

    return _trial(integer_search_is_right, device)


def why_no_search_kernel(x: Tensor) -> str:
    """Reason that the scale search of these rows runs in plain PyTorch; "" if it does not."""
    if why := why_no_triton(x.device):
        return why
    if x.shape[-1] > 256:
        return f"groups of {x.shape[-1]} columns are too long, the kernel holds 256"
    return ""


def fit_kernel(
    x: Tensor, levels: Tensor | None
) -> Callable[..., tuple[Tensor, Tensor | None]] | None:
    """The CPU library's scales of groups, widest and searched, where it applies, else None."""
    if why_no_rounding_on_cpu(x, levels):
        return None
    from loftq.ops.cpu.rounding import fit_scales

    return fit_scales


def why_no_rounding_on_cpu(x: Tensor, levels: Tensor | None) -> str:
    """Reason that the CPU library does not round x to `levels` (None: integers); "" if it does."""
    if x.device.type != "cpu" or x.dtype is not torch.float32:
        return f"weights are {x.dtype} on {x.device.type}, the library takes float32 on a CPU"
    if levels is not None and len(levels) not in LEVELS_CPU:
        return f"a codebook of {len(levels)} levels, the library holds 4, 8 or 16"
    return why_no_library()


def pack_kernel(codes: Tensor) -> Callable[[Tensor, int, int], Tensor] | None:
    """The CPU library's packing of codes where it applies, else None for plain PyTorch."""
    if codes.device.type != "cpu" or codes.dtype is not torch.uint8 or why_no_library():
        return None
    from loftq.ops.cpu.rounding import pack_codes

    return pack_codes


def round_kernel(x: Tensor, levels: Tensor | None) -> Callable[..., tuple[Tensor, Tensor]] | None:
    """The rounding of grouped weights by the CPU library or Triton, else None (plain PyTorch)."""
    if not why_no_rounding_on_cpu(x, levels):
        from loftq.ops.cpu.rounding import round_rows as on_cpu

        return on_cpu
    if why_no_triton(x.device):
        return None
    from loftq.ops.triton.round import round_rows

    return round_rows


def round_columns_kernel(W: Tensor) -> Callable[..., tuple[Tensor, Tensor, Tensor]] | None:
    """The Triton sweep of GPTQ over a block of columns where it applies, else None."""
    if why_no_columns_kernel(W):
        return None
    from loftq.ops.triton.columns import round_columns

    return round_columns


def descend_columns_kernel(Q: Tensor) -> Callable[..., tuple[Tensor, Tensor]] | None:
    """The Triton sweep of coordinate descent over a block of columns, else None."""
    if why_no_columns_kernel(Q):
        return None
    from loftq.ops.triton.columns import descend_columns

    return descend_columns


def why_no_columns_kernel(block: Tensor) -> str:
    """Reason that a block of columns is swept in plain PyTorch, column by column; "" if not."""
    if block.shape[-1] > MOST_COLUMNS:
        return f"a block of {block.shape[-1]} columns is too wide, the kernel holds {MOST_COLUMNS}"
    return why_no_triton(block.device) or _why_no_columns(block.device)


@lru_cache
def _why_no_columns(device: torch.device) -> str:
    from loftq.ops.triton.probe import columns_are_right

    return _trial(columns_are_right, device)


def pointwise_kernels(x: Tensor, *, whole_rows: bool = False) -> ModuleType | None:
    """The Triton kernels between products (ops/triton/pointwise.py) for x, else None."""
    if why_no_pointwise_kernels(x, whole_rows=whole_rows):
        return None
    from loftq.ops.triton import pointwise

    return pointwise


def why_no_pointwise_kernels(x: Tensor, *, whole_rows: bool = False) -> str:
    """Reason that norm (of whole rows), rotation or gate of x run in plain PyTorch; "" if not."""
    if x.dtype not in (torch.float32, torch.float16, torch.bfloat16):
        return f"activations are {x.dtype}, the kernels compute in float32"
    if whole_rows and x.shape[-1] > LONGEST_ROW:
        return f"rows of {x.shape[-1]} columns are too long, a norm holds {LONGEST_ROW}"
    return why_no_pointwise(x.device)


@lru_cache
def why_no_pointwise(device: torch.device) -> str:
    """Reason that a device runs none of the kernels of the training layer; "" if a trial worked."""
    if why := why_no_triton(device):
        return why
    from loftq.ops.triton.pointwise_probe import pointwise_is_right

    return _trial(pointwise_is_right, device)


def dequantize_kernel(packed: Tensor, group_size: int) -> Callable[..., Tensor] | None:
    """The dequantization of the CPU library or Triton where it applies, else None (reference)."""
    if why_no_dequantize_kernel(packed, group_size):
        return None
    if packed.device.type == "cpu":
        from loftq.ops.cpu.linear import dequantize as on_cpu

        return on_cpu
    from loftq.ops.triton.dequantize import dequantize

    return dequantize


def why_no_dequantize_kernel(packed: Tensor, group_size: int) -> str:
    """Reason that these bytes are dequantized in plain PyTorch; "" if they are not."""
    if group_size == PER_TENSOR:
        return "one scale for the whole tensor, which no kernel holds"
    if packed.device.type == "cpu":
        return why_no_library()
    return why_no_triton(packed.device)


def small_linear_kernel(
    x: Tensor, packed: Tensor, bits: int, group_size: int
) -> Callable[..., Tensor] | None:
    """The few-token product from packed bytes where it applies, else None for dequantize + BLAS."""
    if why_no_small_linear(x, packed, bits, group_size):
        return None
    if packed.device.type == "cpu":
        from loftq.ops.cpu.linear import small_linear as on_cpu

        return on_cpu
    from loftq.ops.few_tokens import small_linear

    return small_linear


def why_no_small_linear(x: Tensor, packed: Tensor, bits: int, group_size: int) -> str:
    """Reason that x (..., in_features) meets a dequantized weight in BLAS; "" if it does not."""
    tokens, columns = x.shape[:-1].numel(), x.shape[-1]
    if packed.device.type == "cpu":
        return _why_no_small_linear_on_cpu(x, packed.shape[0], group_size)
    if x.dtype not in (torch.float16, torch.bfloat16):
        return f"activations are {x.dtype}, the kernel takes float16 and bfloat16"
    if not 0 < tokens <= MOST_TOKENS:
        return f"{tokens} tokens: above {MOST_TOKENS}, dequantize + BLAS is faster"
    return _why_not_these_bytes(packed, columns, bits, group_size) or why_no_kernels(packed.device)


def many_tokens_kernel(
    x: Tensor, packed: Tensor, bits: int, group_size: int
) -> Callable[..., Tensor] | None:
    """The fused product of many tokens where it applies, else None for dequantize + BLAS."""
    if why_no_many_tokens(x, packed, bits, group_size):
        return None
    from loftq.ops.triton.many_tokens import many_tokens_linear

    return many_tokens_linear


def why_no_many_tokens(x: Tensor, packed: Tensor, bits: int, group_size: int) -> str:
    """Reason that many tokens x (..., in_features) meet a dequantized weight in BLAS, or ""."""
    tokens = x.shape[:-1].numel()
    if x.dtype not in (torch.float16, torch.bfloat16):
        return f"activations are {x.dtype}, the kernel takes float16 and bfloat16"
    if tokens <= MOST_TOKENS:
        return f"{tokens} tokens: up to {MOST_TOKENS}, the few-token product is the one to take"
    if tokens > MOST_TOKENS_FUSED:
        return f"{tokens} tokens: above {MOST_TOKENS_FUSED}, it was not measured to be faster"
    why = _why_not_these_bytes(packed, x.shape[-1], bits, group_size)
    return why or why_no_fused(packed.device)


@lru_cache
def why_no_fused(device: torch.device) -> str:
    """Reason that a device runs no fused product of many tokens; "" if a trial worked."""
    if why := why_no_kernels(device):
        return why
    if torch.cuda.get_device_capability(device)[0] != 9:
        return "matrix instructions that take weights from registers need compute capability 9.0"
    from loftq.ops.triton.probe import many_tokens_are_right

    return _trial(many_tokens_are_right, device)


def _why_not_these_bytes(packed: Tensor, columns: int, bits: int, group_size: int) -> str:
    """Reason that no product reads these packed bytes on a GPU; "" if they do."""
    if bits == 8 or (group_size > 0 and group_size % 64) or group_size == PER_TENSOR:
        return f"{bits} bits, groups of {group_size}: the kernel holds 2 to 4 bits, groups of 64 up"
    if columns % 64:
        return f"in_features={columns} is not a multiple of 64"
    if packed.dtype is not torch.uint8 or not packed.is_contiguous() or packed.data_ptr() % 16:
        return "the packed bytes are cast, strided or not aligned to 16 bytes"
    return ""


def why_no_cuda_product(x: Tensor, members: Sequence[Any]) -> str:
    """Reason that the few-token product of `members` (few_tokens.Member) is Triton's; "" if it is
    CUDA C++'s (ops/cuda)."""
    tokens, rows = x.shape[0], sum(member.packed.shape[0] for member in members)
    why = _why_no_cuda_here(x.device) or _why_not_ahead(tokens, members[0].layout[0], rows)
    tried = CUDA_TOKENS if tokens in CUDA_TOKENS else MORE_CUDA_TOKENS
    if why := why or why_no_cuda(x.device, tried[-1]):
        return why
    from loftq.ops.cuda.few_tokens import why_not

    return why_not(x, members)


def _why_not_ahead(tokens: int, bits: int, rows: int) -> str:
    """Reason that CUDA C++ does not take a product that it holds: no row shows it ahead."""
    if tokens in CUDA_TOKENS:
        return ""
    if tokens not in MORE_CUDA_TOKENS:
        few, more = (f"{t[0]} to {t[-1]}" for t in (CUDA_TOKENS, MORE_CUDA_TOKENS))
        return f"{tokens} tokens: CUDA C++ was measured ahead at {few} and {more}"
    if bits != MORE_CUDA_BITS or rows < MORE_CUDA_ROWS:
        return (
            f"{tokens} tokens, {bits} bits, {rows} rows: above {CUDA_TOKENS[-1]} tokens CUDA C++ "
            f"was measured ahead at {MORE_CUDA_BITS} bits and {MORE_CUDA_ROWS} rows"
        )
    return ""


@lru_cache
def why_no_cuda(device: torch.device, tokens: int = CUDA_TOKENS[-1]) -> str:
    """Reason that a device runs no CUDA C++ for so many tokens; "" if a trial of the source that
    takes them worked. Compiles it to find out."""
    if why := _why_no_cuda_here(device):
        return why
    from loftq.ops.cuda.probe import product_is_right

    return _trial(partial(product_is_right, tokens=tokens), device)


@lru_cache
def _why_no_cuda_here(device: torch.device) -> str:
    """Reason that a device runs no CUDA C++, as far as it is known without a compiler."""
    if device.type != "cuda" or torch.version.hip is not None:
        return f"{device.type} is no NVIDIA GPU"
    if os.environ.get("LOFTQ_CUDA") == "none":
        return "LOFTQ_CUDA=none asks for the Triton product"
    if torch.cuda.get_device_capability(device) < (9, 0):
        return "its plan of shared memory needs compute capability 9.0"
    return ""


def _why_no_small_linear_on_cpu(x: Tensor, rows: int, group_size: int) -> str:
    tokens, dtypes = x.shape[:-1].numel(), (torch.float32, torch.float16, torch.bfloat16)
    large = rows * x.shape[-1] >= LARGE_WEIGHT
    most = MOST_TOKENS_LARGE_CPU if large else MOST_TOKENS_CPU
    if x.dtype not in dtypes:
        return f"activations are {x.dtype}, the library takes float32, float16 and bfloat16"
    if not 0 < tokens <= most:
        return f"{tokens} tokens: above {most}, dequantize + BLAS is faster"
    if group_size == PER_TENSOR:
        return "one scale for the whole tensor, which no kernel holds"
    return why_no_library()


def may_overlap(device: torch.device) -> bool:
    """Whether launches may start while the ones before them end (ops/triton/overlap.py)."""
    if device.type != "cuda" or torch.version.hip is not None or why_no_triton(device):
        return False
    return torch.cuda.get_device_capability(device) >= (9, 0)


def why_no_decode_kernels(x: Tensor) -> str:
    """Reason that norm, rotation and attention of a decoded token run in plain PyTorch, or ""."""
    if x.dtype not in (torch.float16, torch.bfloat16):
        return f"activations are {x.dtype}, the kernels take float16 and bfloat16"
    return why_no_decoding(x.device)


@lru_cache
def why_no_decoding(device: torch.device) -> str:
    """Reason that a device runs none of the kernels of a decoded token; "" if a trial worked."""
    if why := why_no_triton(device):
        return why
    if torch.version.hip is not None:
        return "the kernels of a decoded token are untested on AMD GPUs"
    from loftq.ops.triton.decode_probe import decoding_is_right

    return _trial(decoding_is_right, device)


def why_no_kernels(device: torch.device) -> str:
    """Reason that a device runs none or only some of the kernels; "" if a trial of each worked."""
    return why_no_triton(device) or _why_no_permute(device)


@lru_cache
def _why_no_permute(device: torch.device) -> str:
    """Reason that the decode by byte permutes is not used here; "" if a trial came out right."""
    if torch.version.hip is not None:
        return "byte permutes are NVIDIA's, and the portable decode is untested on AMD GPUs"
    if torch.cuda.get_device_capability(device) < (8, 0):
        return "matrix instructions for bfloat16 need compute capability 8.0"
    from loftq.ops.triton.probe import levels_are_right

    return _trial(levels_are_right, device)


def _trial(is_right: Callable[[torch.device], bool], device: torch.device) -> str:
    """Reason that a kernel is not used on this device; "" if a trial of it came out right."""
    try:
        right = is_right(device)
    except torch.OutOfMemoryError:
        raise  # says nothing about the kernel; an exception is not kept
    except Exception as error:  # a compiler that refuses the assembly: anything is raised
        return f"the kernel does not compile here: {_first_line(error)}"
    return "" if right else "a trial of the kernel gave wrong values with this Triton: report it"


@lru_cache
def why_no_triton(device: torch.device) -> str:
    """Reason that no Triton kernel runs on this device; "" if they do. Compiles one to find out."""
    if device.type != "cuda":
        return f"weights are on {device.type}, the kernels need a GPU"
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed"
    from loftq.ops.triton.round import round_rows

    one = torch.ones(1, 16, device=device)
    try:
        round_rows(one, one[:, 0].contiguous(), None, one[0].contiguous(), top=0, tiny=1e-30)
    except torch.OutOfMemoryError:
        raise  # says nothing about Triton; an exception is not kept
    except Exception as error:  # a compiler, driver or GPU that does not suit: anything is raised
        return f"triton does not work here: {_first_line(error)}"
    return ""


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
