"""Names of formats and what they cost: `nf4-g64-dq` <-> FormatSpec."""

from __future__ import annotations

import difflib
import re
from dataclasses import dataclass

from loftq.formats.codebooks import IQ4_NL, even_levels, normal_float, symmetric_normal_float
from loftq.ops.hadamard import BLOCKS
from loftq.ops.reference import (
    NESTED_RUN,
    PER_CHANNEL,
    PER_TENSOR,
    SCALE_BYTES,
    row_bytes,
)

GRID_BITS = {
    "nf": (2, 3, 4),
    "snf": (2, 3, 4),
    "iq4nl": (4,),
    "int": (2, 3, 4, 8),
    "sint": (2, 3, 4, 8),
    "even": (2, 3, 4),
    "uniform": (2, 3, 4, 8),
}
GROUP_SIZES = (16, 32, 64, 128, 256)
DEFAULT_GROUP = 64
_NAME = re.compile(
    r"(?P<grid>iq4nl|nf|snf|int|sint|even|uniform)(?P<bits>\d*)"
    r"(?:-(?P<group>g\d+|channel|tensor))?(?:-(?P<coding>dq|f16|bf16|f32))?(?:-h(?P<rotation>\d+))?"
)


@dataclass(frozen=True, kw_only=True)
class FormatSpec:
    """What the bytes of one quantized weight mean. `str(spec)` and `parse_format` are inverse."""

    grid: str
    """Where the levels lie: nf, snf (symmetric), iq4nl, int (asymmetric), sint, even, uniform."""
    bits: int
    """Bits of a code: 2, 3, 4 or 8."""
    group_size: int = DEFAULT_GROUP
    """Columns that share a scale; 0 = one scale per row, -1 = one for the tensor (uniform only)."""
    scale_coding: str = "dq"
    """How a scale is stored: dq (nested, 8 bits), f16, bf16 or f32."""
    rotation: int = 0
    """Columns of a block in which the input side is rotated (ops/hadamard.py); 0 = it is not."""

    def __post_init__(self) -> None:
        if self.grid not in GRID_BITS:
            raise ValueError(_unknown(self.grid, f"unknown grid {self.grid!r}"))
        if self.bits not in GRID_BITS[self.grid]:
            allowed = ", ".join(map(str, GRID_BITS[self.grid]))
            raise ValueError(f"{self.grid}: {self.bits} bits do not exist; choose {allowed}.")
        whole = self.grid == "uniform"
        if whole != (self.group_size == PER_TENSOR) or (whole and self.scale_coding != "f32"):
            raise ValueError(
                f"{self.grid}{self.bits}: only `uniform` has one scale for the whole tensor, in "
                f"float32: write uniform{self.bits}-tensor-f32, or int{self.bits}-g64."
            )
        if self.group_size not in (*GROUP_SIZES, PER_CHANNEL, PER_TENSOR):
            raise ValueError(
                f"group_size={self.group_size} does not exist; choose one of "
                f"{', '.join(map(str, GROUP_SIZES))}, or `channel` for one scale per row."
            )
        if self.scale_coding not in SCALE_BYTES:
            raise ValueError(
                f"scale coding {self.scale_coding!r} does not exist; "
                f"choose {', '.join(SCALE_BYTES)}."
            )
        if self.rotation not in (0, *BLOCKS):
            raise ValueError(
                f"a rotation in blocks of {self.rotation} columns does not exist; "
                f"choose {', '.join(map(str, BLOCKS))}."
            )
        if self.rotation and self.group_size == PER_TENSOR:
            raise ValueError(
                f"{self}: `uniform` is stored unrotated. Leave -h{self.rotation} out, or choose "
                f"another grid, such as int{self.bits}-g64-dq-h{self.rotation}."
            )

    def __str__(self) -> str:
        grid = self.grid if self.grid == "iq4nl" else f"{self.grid}{self.bits}"
        group = {PER_CHANNEL: "channel", PER_TENSOR: "tensor"}.get(
            self.group_size, f"g{self.group_size}"
        )
        turned = f"-h{self.rotation}" if self.rotation else ""
        return f"{grid}-{group}-{self.scale_coding}{turned}"

    @property
    def levels(self) -> tuple[float, ...]:
        """The codebook, or () where a code is its own value."""
        if self.grid == "nf":
            return normal_float(self.bits)
        if self.grid == "snf":
            return symmetric_normal_float(self.bits)
        if self.grid == "even":
            return even_levels(self.bits)
        return tuple(map(float, IQ4_NL)) if self.grid == "iq4nl" else ()

    @property
    def default_zero(self) -> float:
        """The zero of grids that store none: 2^(bits-1) for `sint`, else 0."""
        return float(2 ** (self.bits - 1)) if self.grid == "sint" else 0.0

    def groups(self, in_features: int) -> int:
        """Scales per row; the last group may be shorter."""
        return 1 if self.group_size <= 0 else -(-in_features // self.group_size)

    def bits_per_weight(self, out_features: int, in_features: int) -> float:
        """Stored bits over weights: codes, row padding, scales, zeros, nested constants."""
        shapes = component_shapes(self, (out_features, in_features))
        stored = sum(rows * columns for rows, columns in map(_as_2d, shapes.values()))
        return 8 * stored / (out_features * in_features)


def _as_2d(shape: tuple[int, ...]) -> tuple[int, int]:
    return (shape[0], shape[1]) if len(shape) == 2 else (1, shape[0])


def component_shapes(spec: FormatSpec, shape: tuple[int, int]) -> dict[str, tuple[int, ...]]:
    """Shapes of the uint8 tensors that hold a weight of `shape` (out_features, in_features).

    Raises:
        ValueError: a rotation whose blocks do not fill a row.
    """
    out_features, in_features = shape
    if spec.rotation and in_features % spec.rotation:
        raise ValueError(
            f"{spec}: {in_features} columns are not whole blocks of {spec.rotation}. Choose a "
            "smaller block, or leave the layer unrotated."
        )
    if spec.group_size == PER_TENSOR:
        return {
            "weight_packed": (out_features, row_bytes(in_features, spec.bits)),
            "weight_scale": (1, 4),
            "weight_zero": (1, 4),
        }
    groups = spec.groups(in_features)
    shapes: dict[str, tuple[int, ...]] = {
        "weight_packed": (out_features, row_bytes(in_features, spec.bits)),
        "weight_scale": (out_features, groups * SCALE_BYTES[spec.scale_coding]),
    }
    if spec.grid == "int":
        shapes["weight_zero"] = (out_features, row_bytes(groups, spec.bits))
    if spec.scale_coding == "dq":
        shapes["weight_nested"] = (4 + 4 * -(-out_features * groups // NESTED_RUN),)
    return shapes


def parse_format(name: str) -> FormatSpec:
    """FormatSpec of a name such as `nf4`, `nf2-g32`, `int3-g128-f16`, `int2-g64-dq-h64`.

    Group 64 and nested ("dq") scales are the defaults; iq4nl defaults to groups of 32 with float16
    scales and `uniform` to one float32 scale for the tensor, the only forms their readers know.

    Raises:
        ValueError: unknown name (with the nearest known one) or a combination that does not exist.
    """
    match = _NAME.fullmatch(name)
    if match is None or (match["grid"] == "iq4nl") == bool(match["bits"]):
        raise ValueError(_unknown(name, f"unknown format {name!r}"))
    grid, group, coding = match["grid"], match["group"], match["coding"]
    if group is None:
        group = {"iq4nl": "g32", "uniform": "tensor"}.get(grid, f"g{DEFAULT_GROUP}")
    size = {"channel": PER_CHANNEL, "tensor": PER_TENSOR}.get(group)
    return FormatSpec(
        grid=grid,
        bits=int(match["bits"] or 4),
        group_size=int(group[1:]) if size is None else size,
        scale_coding=coding or {"iq4nl": "f16", "uniform": "f32"}.get(grid, "dq"),
        rotation=int(match["rotation"] or 0),
    )


def known_formats() -> tuple[str, ...]:
    """The short names, one per grid and width: nf4, nf3, ..., iq4nl."""
    return tuple(
        grid if grid == "iq4nl" else f"{grid}{bits}"
        for grid, widths in GRID_BITS.items()
        for bits in widths
    )


def _unknown(name: str, problem: str) -> str:
    stem = name.split("-")[0]
    near = difflib.get_close_matches(stem, known_formats(), n=1, cutoff=0.4)
    hint = f"Did you mean {near[0]}?" if near else "Known: " + ", ".join(known_formats()) + "."
    return (
        f"{problem}. {hint} A name is GRID+BITS[-gSIZE|-channel][-dq|-f16|-bf16|-f32][-hBLOCK], "
        "for example nf4-g64-dq."
    )
