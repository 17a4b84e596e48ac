"""How a product is cut into blocks, and what lies where in their shared memory."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Protocol

import torch
from torch import Tensor

from loftq.ops.cuda.compiler import room
from loftq.ops.few_tokens import Member
from loftq.ops.reference import SCALE_DTYPES

TILE = 256  # columns
BASE = 1024  # the first address of shared memory, where the table begins (decode.cuh)
RESERVED = 1024  # bytes of shared memory that every block after the first costs beside its own
MOST_WAVES = 3  # times as many blocks as multiprocessors


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

    @classmethod
    def of(cls, x: Tensor, members: Sequence[Member]) -> Work:
        """x (tokens, in_features) and weights that agree in everything but their rows."""
        bits, group_size, coding = members[0].layout[:3]
        lora_A = members[0].lora_A
        return cls(
            bits=bits, group_size=group_size, scale_coding=coding,
            sizes=tuple(m.packed.shape[0] for m in members), columns=x.shape[1],
            tokens=x.shape[0], rank=members[0].rank,
            adapter_bytes=0 if lora_A is None else lora_A.element_size(),
        )  # fmt: skip

    @property
    def scale_bytes(self) -> int:
        """Of the scales of a row in a tile."""
        itemsize = 1 if self.scale_coding == "dq" else SCALE_DTYPES[self.scale_coding].itemsize
        return itemsize * TILE // self.group_size

    @property
    def row_bytes(self) -> int:
        """Of a row in a tile."""
        return 32 * self.bits + self.scale_bytes + (4 if self.scale_coding == "dq" else 0)

    def blocks(self, share: int) -> int:
        """Blocks of `share` rows, each within one weight."""
        return sum(-(-size // share) for size in self.sizes)

    def share(self, most_blocks: int) -> int:
        """The fewest rows of a block with which `most_blocks` blocks suffice."""
        share = -(-sum(self.sizes) // most_blocks)
        while self.blocks(share) > most_blocks:
            share += 1
        return share


class Launch(Protocol):
    """Shape of one launch of a source file."""

    @property
    def source(self) -> str:
        """Name of the file, and of the function in it."""

    @property
    def warps(self) -> int:
        """Warps of a block."""

    @property
    def resident(self) -> int:
        """Blocks that share a multiprocessor, of this launch or of the next one."""

    @property
    def slab(self) -> int:
        """Rows that are decoded together: 16 or 32."""

    @property
    def definitions(self) -> tuple[tuple[str, int], ...]:
        """Of the source file, those that depend on the shape."""

    def fits(self, work: Work, share: int) -> bool:
        """Whether it holds blocks of `share` rows."""

    def needs(self, work: Work, share: int) -> dict[str, int]:
        """Bytes of shared memory by the names of `Arguments`."""


@dataclass(frozen=True, kw_only=True)
class FewTokens:
    """few_tokens.cu: up to 16 tokens, each warp with tiles of its own."""

    warps: int
    slab: int
    ahead: int
    """Tiles of a warp on their way."""
    tokens: int = 8
    """The most: 8 or 16."""
    resident: int = 1
    """Blocks that share a multiprocessor: with 2, the next launch fetches while this one ends."""
    early: bool = False
    """Whether s A x^T is added up while tiles are on their way (early.cuh): not timed yet."""

    source = "few_tokens"

    @property
    def definitions(self) -> tuple[tuple[str, int], ...]:
        return (
            ("WARPS", self.warps), ("SLAB", self.slab), ("TOKENS", self.tokens),
            ("AHEAD", self.ahead), ("RESIDENT", self.resident), ("EARLY", int(self.early)),
        )  # fmt: skip

    def fits(self, work: Work, share: int) -> bool:
        return work.tokens <= self.tokens

    def needs(self, work: Work, share: int) -> dict[str, int]:
        return {
            "ring": self.warps * self.ahead * self.slab * work.row_bytes,
            "sums": 4 * self.warps * share * work.tokens,
        }


@dataclass(frozen=True, kw_only=True)
class MoreTokens:
    """more_tokens.cu: 17 to 64 tokens, x read once by a block."""

    slabs: int
    """Of a block, four warps for each."""
    tokens: int
    """The most: 16, 32 or 64."""
    slab: int = 32

    source, resident = "more_tokens", 1

    @property
    def warps(self) -> int:
        return 4 * self.slabs

    @property
    def definitions(self) -> tuple[tuple[str, int], ...]:
        return (
            ("WARPS", self.warps), ("SLAB", self.slab), ("TOKENS", self.tokens),
            ("RESIDENT", self.resident), ("EARLY", 0),
        )  # fmt: skip

    def fits(self, work: Work, share: int) -> bool:
        return work.tokens <= self.tokens and share <= self.slabs * self.slab

    def needs(self, work: Work, share: int) -> dict[str, int]:
        tiles = 2 * (self.tokens * (2 * TILE + 16) + self.slabs * self.slab * work.row_bytes)
        return {"ring": max(tiles, 4 * 4 * share * work.tokens)}  # sums take the place of tiles


@dataclass(frozen=True, kw_only=True)
class Teams:
    """teams.cu: as more_tokens.cu, in fewer instructions; not timed yet."""

    slabs: int
    """Of a tile, four warps for each."""
    tokens: int
    """The most: 16, 32 or 64."""
    slab: int = 32
    span: int = 1
    """Tiles that are taken at once: with few rows a tile is too little work for a block."""

    source, resident = "teams", 1

    @property
    def warps(self) -> int:
        return 4 * self.slabs * self.span

    @property
    def definitions(self) -> tuple[tuple[str, int], ...]:
        return (
            ("WARPS", self.warps), ("SLAB", self.slab), ("TOKENS", self.tokens),
            ("RESIDENT", self.resident), ("EARLY", 0), ("SPAN", self.span),
        )  # fmt: skip

    def fits(self, work: Work, share: int) -> bool:
        return work.tokens <= self.tokens and share <= self.slabs * self.slab

    def needs(self, work: Work, share: int) -> dict[str, int]:
        tile = self.tokens * (2 * TILE + 16) + self.slabs * self.slab * work.row_bytes
        sums = 4 * 4 * self.span * share * work.tokens
        return {"ring": max(2 * self.span * tile, sums)}  # sums take the place of tiles


@dataclass(frozen=True)
class Plan:
    """A launch, the rows of a block, and addresses in shared memory by name (sums: of the ring,
    unless they have a place of their own)."""

    launch: Launch
    share: int
    places: dict[str, int]
    shared: int
    """Bytes of shared memory."""


LAUNCHES: tuple[Launch, ...] = (
    FewTokens(warps=16, slab=32, ahead=1),
    FewTokens(warps=16, slab=16, ahead=1),
    *(FewTokens(warps=16, slab=16, ahead=ahead, tokens=16) for ahead in (3, 2, 1)),
    *(
        MoreTokens(slabs=slabs, slab=slab, tokens=tokens)
        for tokens in (32, 64)
        for slabs, slab in ((2, 16), (3, 32))
    ),
)
"""In the order of preference: the first that fits is taken."""


@lru_cache(maxsize=1024)
def plan_of(work: Work, device: torch.device, launches: tuple[Launch, ...]) -> Plan | None:
    """The first of `launches` that fits, in as few waves of blocks as possible; None without."""
    multiprocessors, shared = room(device)
    for waves in range(1, MOST_WAVES + 1):
        share = work.share(multiprocessors * waves)
        for launch in launches:
            if not launch.fits(work, share):
                continue
            places, end = place(work, launch.needs(work, share))
            if end - BASE <= (shared - RESERVED * (launch.resident - 1)) // launch.resident:
                return Plan(launch, share, {"sums": places["ring"], **places}, end - BASE)
    return None


def place(work: Work, needs: dict[str, int]) -> tuple[dict[str, int], int]:
    """Addresses behind the table for what every launch needs and for `needs`, and their end."""
    nested, table = work.scale_coding == "dq", 256 * (64 if work.bits == 3 else 256)
    needs = {
        **needs,
        "map_copies": 8192 if nested and work.bits != 4 else 0,
        "ax_sums": work.tokens * (-(-work.rank // 64) * 128 + 16) if work.rank else 0,
    }
    places, end = {}, BASE + table
    for name, size in needs.items():
        places[name], end = end, end + -(-size // 128) * 128
    if work.bits == 4:
        places["map_copies"] = BASE + 128  # an entry of the table takes half of its 256 bytes
    return places, end
