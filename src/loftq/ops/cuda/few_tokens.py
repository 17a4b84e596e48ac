"""The few-token product in CUDA C++ (few_tokens.cu): definitions, launch shape, arguments."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from loftq.ops.cuda.compiler import kernel, room
from loftq.ops.cuda.counters import counters
from loftq.ops.few_tokens import Member
from loftq.ops.reference import SCALE_DTYPES, dynamic_map_on

SOURCE = "few_tokens.cu"
SCALES = {"dq": 0, "f16": 1, "bf16": 2, "f32": 3}
MOST_MEMBERS, MOST_TOKENS = 3, 16
TILE = 256  # columns
BASE, TABLE = 1024, 0x20000  # of shared memory: the first address, the table's (decode.cuh)
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
            "tokens", "rows", "share", "height", "rank", "chunk", "parts", "members")),
        *((name, ctypes.c_uint) for name in ("unit_blocks", "ring", "sums", "map_copies", "b_rows", "ax_sums")),
        ("levels", ctypes.c_uint16 * 16),
    )  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Launch:
    """Shape of one launch."""

    warps: int
    """Warps of a block: each has tiles of its own."""
    slab: int
    """Rows of a tile: 16 or 32."""
    ahead: int
    """Tiles of a warp on their way."""


@dataclass(frozen=True, kw_only=True)
class Work:
    """What a launch has to do, as far as its shape depends on it."""

    bits: int
    group_size: int
    scale_coding: str
    sizes: tuple[int, ...]
    columns: int
    tokens: int
    rank: int
    adapter_bytes: int
    """Of a number of A and B: 2 or 4; 0 without adapters."""

    @property
    def scale_bytes(self) -> int:
        """Of the scales of a row in a tile."""
        itemsize = 1 if self.scale_coding == "dq" else SCALE_DTYPES[self.scale_coding].itemsize
        return itemsize * TILE // self.group_size

    @property
    def stage(self) -> int:
        """Bytes of a row in a tile."""
        return 32 * self.bits + self.scale_bytes + (4 if self.scale_coding == "dq" else 0)

    def share(self, blocks: int) -> int:
        """Rows of a block: the fewest that `blocks` blocks can cover, each within one weight."""
        share = -(-sum(self.sizes) // blocks)
        while sum(-(-size // share) for size in self.sizes) > blocks:
            share += 1
        return share


LAUNCHES = tuple(Launch(warps=16, slab=16, ahead=ahead) for ahead in (3, 2, 1))
"""In the order of preference: the first that fits is taken."""


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
    work = _work(x, members)
    if work.scale_bytes < 4:
        return f"groups of {group_size} with scales in {coding}: less than a word in 256 columns"
    if _fit(work, x.device, LAUNCHES) is None:
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
        launch: its shape; None = the default that fits.
        overlap: start while the kernel before it runs, which must not write weights; None = while
            a graph is captured, in which weights do not change.
    """
    x = x.contiguous()
    work, first = _work(x, members), members[0]
    y = torch.empty((work.tokens, sum(work.sizes)), dtype=x.dtype, device=x.device)
    plan = _fit(work, x.device, (launch,) if launch else LAUNCHES)
    if plan is None:
        raise ValueError(f"few_tokens: {launch} does not fit into shared memory for {work}.")
    launch, share, places = plan
    tiles, most = work.columns // TILE, 8 if work.tokens <= 8 else 16
    chunk, blocks = -(-tiles // MOST_PARTS), sum(-(-size // share) for size in work.sizes)
    parts = -(-tiles // chunk)
    capturing = torch.cuda.is_current_stream_capturing() if x.is_cuda else False
    arguments = _Arguments(
        x=x.data_ptr(), y=y.data_ptr(), map=dynamic_map_on(x.device).data_ptr(),
        layout=_Layout(work.columns, work.columns // work.group_size, first.packed.shape[1]),
        tokens=work.tokens, rows=sum(work.sizes), share=share, height=_height(share, launch.slab),
        rank=work.rank, chunk=chunk, parts=parts, members=len(members), unit_blocks=blocks, **places,
    )  # fmt: skip
    arguments.levels[:] = _levels(first, x.dtype)
    for i, member in enumerate(members):
        block = sum(-(-size // share) for size in work.sizes[:i])
        arguments.weights[i] = _weight(member, block, sum(work.sizes[:i]))
    if work.rank:
        shape = (len(members), parts, work.tokens, work.rank)
        ax = torch.empty(shape, dtype=torch.float32, device=x.device)
        arguments.ax, arguments.counts = ax.data_ptr(), counters(x.device, capturing)
    definitions = (
        ("BITS", work.bits), ("HALF", int(x.dtype == torch.float16)), ("GROUP", work.group_size),
        ("SCALE", SCALES[work.scale_coding]), ("RANKED", work.adapter_bytes),
        ("WARPS", launch.warps), ("SLAB", launch.slab), ("TOKENS", most), ("AHEAD", launch.ahead),
    )  # fmt: skip
    with torch.cuda.device_of(x):
        kernel(SOURCE, "few_tokens", definitions, x.device)(
            (blocks, 1, 1), launch.warps * 32, (arguments,), shared=room(x.device)[1],
            overlap=capturing if overlap is None else overlap,
        )  # fmt: skip
    return y


def _work(x: Tensor, members: Sequence[Member]) -> Work:
    bits, group_size, coding = members[0].layout[:3]
    lora_A = members[0].lora_A
    return Work(
        bits=bits, group_size=group_size, scale_coding=coding,
        sizes=tuple(m.packed.shape[0] for m in members), columns=x.shape[1], tokens=x.shape[0],
        rank=members[0].rank, adapter_bytes=0 if lora_A is None else lora_A.element_size(),
    )  # fmt: skip


def _weight(member: Member, blocks: int, before: int) -> _Weight:
    pointers = (
        None if t is None else t.data_ptr()
        for t in (member.packed, member.scale, member.nested, member.lora_A, member.lora_B)
    )
    return _Weight(*pointers, member.packed.shape[0], blocks, before, float(member.scaling))


@lru_cache(maxsize=1024)
def _fit(
    work: Work, device: torch.device, launches: tuple[Launch, ...]
) -> tuple[Launch, int, dict[str, int]] | None:
    """(launch, rows of a block, addresses in shared memory) of the first launch that fits."""
    blocks, shared = room(device)
    share = work.share(blocks)
    table = 256 * (64 if work.bits == 3 else 256)
    for launch in launches:
        needs = {
            "ring": launch.warps * launch.ahead * launch.slab * work.stage,
            "sums": 4 * launch.warps * share * work.tokens,
            "b_rows": share * (work.adapter_bytes * work.rank + 16) if work.rank else 0,
            "map_copies": 8192 if work.scale_coding == "dq" else 0,
            "ax_sums": 4 * work.tokens * work.rank,
        }
        free = {BASE: TABLE, TABLE + table: BASE + shared}
        places = {}
        for name, size in sorted(needs.items(), key=lambda item: -item[1]):
            size = -(-size // 128) * 128
            start = next((at for at, end in free.items() if end - at >= size), None)
            if start is None:
                break
            places[name] = start
            free[start + size] = free.pop(start)
        else:
            return launch, share, places
    return None


def _height(share: int, slab: int) -> int:
    """Rows of a slab, as equal as they come."""
    return -(-share // -(-share // slab))


def _levels(member: Member, dtype: torch.dtype) -> list[int]:
    """The grid's levels as bits of x's dtype, 16 of them."""
    bits, _, _, levels, default_zero = member.layout
    return list(_level_bits(tuple(levels), bits, default_zero, dtype))


@lru_cache
def _level_bits(
    levels: tuple[float, ...], bits: int, default_zero: float, dtype: torch.dtype
) -> tuple[int, ...]:
    values = levels or tuple(code - default_zero for code in range(2**bits))
    stored = torch.tensor(values, dtype=torch.float32).to(dtype).view(torch.int16)
    return tuple(int(v) & 0xFFFF for v in stored.tolist()) + (0,) * (16 - len(values))
