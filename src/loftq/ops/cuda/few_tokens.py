"""Few-token products in CUDA C++ (few_tokens.cu, more_tokens.cu): arguments and launch."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from functools import lru_cache

import torch
from torch import Tensor

from loftq.ops.cuda.compiler import kernel, room
from loftq.ops.cuda.counters import counters
from loftq.ops.cuda.plan import LAUNCHES, TILE, Launch, Plan, Work, plan_of
from loftq.ops.few_tokens import Member
from loftq.ops.reference import dynamic_map_on

SCALES = {"dq": 0, "f16": 1, "bf16": 2, "f32": 3}
MOST_MEMBERS, MOST_TOKENS = 3, 64
MOST_PARTS = 16  # of x A^T, which every block adds up


class _Weight(ctypes.Structure):
    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("packed", "scale", "nested", "a", "b")),
        *((name, ctypes.c_int) for name in ("rows", "blocks", "before")),
        ("scaling", ctypes.c_float),
    )


class _Layout(ctypes.Structure):
    _fields_ = tuple((name, ctypes.c_int) for name in ("columns", "groups", "row_bytes"))


class _Arguments(ctypes.Structure):
    _fields_ = (
        ("weights", _Weight * MOST_MEMBERS),
        *((name, ctypes.c_void_p) for name in ("x", "y", "ax", "counts", "map")),
        ("layout", _Layout),
        *((name, ctypes.c_int) for name in (
            "tokens", "rows", "share", "height", "rank", "chunk", "parts", "members", "own_rank",
            "own_tokens")),
        *((name, ctypes.c_uint) for name in (
            "unit_blocks", "ring", "sums", "map_copies", "ax_sums")),
        ("levels", ctypes.c_uint16 * 16),
    )  # fmt: skip


def why_not(x: Tensor, members: Sequence[Member]) -> str:
    """Reason that this product does not take these weights together, or ""; formats agree."""
    bits, group_size, coding = members[0].layout[:3]
    tokens, columns = x.shape
    if members[0].zero is not None:
        return "the grid has zeros"
    if bits not in (2, 3, 4) or group_size not in (64, 128, 256):
        return f"{bits} bits, groups of {group_size}: it holds 2 to 4 bits, groups of 64 to 256"
    if columns % TILE:
        return f"in_features={columns} is not a multiple of {TILE}"
    if not 0 < tokens <= MOST_TOKENS:
        return f"{tokens} tokens: it holds {MOST_TOKENS}"
    if x.is_contiguous() and x.data_ptr() % 16:
        return "x is not aligned to 16 bytes"
    if len(members) > MOST_MEMBERS:
        return f"{len(members)} weights, it holds {MOST_MEMBERS}"
    for m in members:
        if m.lora_A is not None and m.lora_B is not None and (
            m.rank % 8 or m.lora_A.dtype != m.lora_B.dtype
            or m.lora_A.dtype not in (x.dtype, torch.float32)
        ):  # fmt: skip
            dtypes = f"{m.lora_A.dtype} and {m.lora_B.dtype}"
            return f"an adapter of rank {m.rank} in {dtypes} beside {x.dtype}"
        aligned = (m.packed, m.scale, m.nested, m.lora_A, m.lora_B)
        if any(t is not None and (t.data_ptr() % 16 or not t.is_contiguous()) for t in aligned):
            return "packed bytes or an adapter are strided or not aligned to 16 bytes"
    work = Work.of(x, members)
    if work.scale_bytes < 4:
        return f"groups of {group_size} with scales in {coding}: less than a word in 256 columns"
    if plan_of(work, x.device, LAUNCHES) is None:
        return f"rank {work.rank} of {sum(work.sizes)} rows does not fit into shared memory"
    return ""


def few_tokens(
    x: Tensor,
    members: Sequence[Member],
    *,
    launch: Launch | None = None,
    overlap: bool | None = None,
) -> Tensor:
    """[x W_i^T + s_i (x A_i^T) B_i^T for each member], side by side; one launch.

    Args:
        x: (tokens, in_features), float16 or bfloat16.
        members: that `why_not` has nothing against.
        launch: its shape; None = the first of LAUNCHES that fits.
        overlap: start while the kernel before it runs, which must not write weights; None = while
            a graph is captured, in which weights do not change.

    Raises:
        ValueError: `launch` does not hold this product.
    """
    x = x.contiguous()
    work = Work.of(x, members)
    plan = plan_of(work, x.device, LAUNCHES if launch is None else (launch,))
    if plan is None:
        raise ValueError(f"few_tokens: {launch} does not hold {work}.")
    capturing = x.is_cuda and torch.cuda.is_current_stream_capturing()
    y = torch.empty((work.tokens, sum(work.sizes)), dtype=x.dtype, device=x.device)
    arguments = _arguments(x, y, members, work, plan)
    if work.rank:
        shape = (len(members), arguments.parts, work.tokens, work.rank)
        ax = torch.empty(shape, dtype=torch.float32, device=x.device)
        counts = counters(x.device, capturing)
        arguments.ax, arguments.counts = ax.data_ptr(), counts.data_ptr()
    definitions = (
        ("BITS", work.bits), ("HALF", int(x.dtype == torch.float16)), ("GROUP", work.group_size),
        ("SCALE", SCALES[work.scale_coding]), ("RANKED", work.adapter_bytes),
        *plan.launch.definitions,
    )  # fmt: skip
    name = plan.launch.source
    with torch.cuda.device_of(x):
        kernel(f"{name}.cu", name, definitions, x.device)(
            (work.blocks(plan.share), 1, 1), plan.launch.warps * 32, (arguments,),
            shared=plan.shared, overlap=capturing if overlap is None else overlap,
        )  # fmt: skip
    return y


def _arguments(
    x: Tensor, y: Tensor, members: Sequence[Member], work: Work, plan: Plan
) -> _Arguments:
    share, tiles, first = plan.share, work.columns // TILE, members[0]
    chunk = -(-tiles // MOST_PARTS)
    arguments = _Arguments(
        x=x.data_ptr(), y=y.data_ptr(), map=dynamic_map_on(x.device).data_ptr(),
        layout=_Layout(work.columns, work.columns // work.group_size, first.packed.shape[1]),
        tokens=work.tokens, rows=sum(work.sizes), share=share,
        height=_height(share, plan.launch.slab), rank=work.rank, chunk=chunk,
        parts=-(-tiles // chunk), members=len(members),
        unit_blocks=min(work.blocks(share), room(x.device)[0]), own_rank=work.rank // first.stacked,
        own_tokens=work.tokens // first.stacked, **plan.places,
    )  # fmt: skip
    bits, _, _, levels, default_zero = first.layout
    arguments.levels[:] = _level_bits(tuple(levels), bits, default_zero, x.dtype)
    for i, member in enumerate(members):
        blocks = sum(-(-size // share) for size in work.sizes[:i])
        arguments.weights[i] = _weight(member, blocks, sum(work.sizes[:i]))
    return arguments


def _weight(member: Member, blocks: int, before: int) -> _Weight:
    pointers = (
        None if t is None else t.data_ptr()
        for t in (member.packed, member.scale, member.nested, member.lora_A, member.lora_B)
    )
    return _Weight(*pointers, member.packed.shape[0], blocks, before, float(member.scaling))


def _height(share: int, slab: int) -> int:
    """Rows of a slab, as equal as they come."""
    return -(-share // -(-share // slab))


@lru_cache
def _level_bits(
    levels: tuple[float, ...], bits: int, default_zero: float, dtype: torch.dtype
) -> tuple[int, ...]:
    """The grid's levels as bits of x's dtype, 16 of them."""
    values = levels or tuple(code - default_zero for code in range(2**bits))
    stored = torch.tensor(values, dtype=torch.float32).to(dtype).view(torch.int16)
    return tuple(int(v) & 0xFFFF for v in stored.tolist()) + (0,) * (16 - len(values))
