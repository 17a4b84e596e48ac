"""Large weights a panel of rows at a time: the dense copy of a head never exists as a whole.

A head of 151,936 x 4,096 weights is 1.2 GB in bfloat16; a panel of it is at most PANEL_WEIGHTS.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from loftq.ops.reference import NESTED_RUN, PER_TENSOR, dynamic_map, view_bytes

PANEL_WEIGHTS = {"cpu": 1 << 24, "cuda": 1 << 27}
"""Most weights that are dense at a time; on a CPU the reference needs more scratch for each."""


@dataclass(frozen=True)
class Packed:
    """The packed tensors of one layer, as the operators take them (`schema.dequantize`)."""

    codes: Tensor
    scale: Tensor
    zero: Tensor | None
    nested: Tensor | None
    in_features: int
    bits: int
    group_size: int
    scale_coding: str
    levels: Sequence[float]
    default_zero: float

    @property
    def arguments(self) -> tuple:
        """Everything in the order of the operators, without the dtype."""
        return (
            self.codes, self.scale, self.zero, self.nested, self.in_features, self.bits,
            self.group_size, self.scale_coding, self.levels, self.default_zero,
        )  # fmt: skip

    def rows(self, start: int, stop: int) -> Packed:
        """The rows start .. stop - 1 as a packed weight of their own; codes are views."""
        if self.group_size == PER_TENSOR:
            return self._with(self.codes[start:stop], self.scale, self.zero, self.nested)
        scale = self.scale[start:stop]
        zero = None if self.zero is None else self.zero[start:stop]
        if self.nested is None:
            return self._with(self.codes[start:stop], scale, zero, None)
        first = start * self.scale.shape[1]
        if first % NESTED_RUN:  # the rows begin inside a run of nested scales
            ids = torch.arange(start, stop, device=scale.device)
            scale = row_scales(scale, self.nested, ids)
            return self._with(self.codes[start:stop], scale, zero, None, "f32")
        constants = self.nested.view(-1, 4)
        last = -(-stop * self.scale.shape[1] // NESTED_RUN)
        nested = torch.cat([constants[:1], constants[1 + first // NESTED_RUN : 1 + last]])
        return self._with(self.codes[start:stop], scale, zero, nested.view(-1))

    def _with(
        self,
        codes: Tensor,
        scale: Tensor,
        zero: Tensor | None,
        nested: Tensor | None,
        scale_coding: str | None = None,
    ) -> Packed:
        return Packed(
            codes, scale, zero, nested, self.in_features, self.bits, self.group_size,
            scale_coding or self.scale_coding, self.levels, self.default_zero,
        )  # fmt: skip


def row_scales(scale: Tensor, nested: Tensor, ids: Tensor) -> Tensor:
    """Nested ("dq") scales of some rows as float32 bytes.

    Args:
        scale: stored bytes of those rows, uint8 (n, groups).
        nested: constants of the whole weight, uint8.
        ids: (n,) number of each row in the whole weight.

    Returns:
        uint8 (n, 4 * groups), the coding "f32".
    """
    stored = scale.to(torch.uint8)
    constants = view_bytes(nested.to(torch.uint8), torch.float32)
    groups = stored.shape[1]
    flat = ids[:, None] * groups + torch.arange(groups, device=ids.device)
    values = dynamic_map(stored.device)[stored.long()]
    return (values * constants[1:][flat // NESTED_RUN] + constants[0]).view(torch.uint8)


def panel_rows(rows: int, columns: int, device: torch.device) -> int:
    """Rows that are dense at a time: all of a small weight, else a multiple of a nested run."""
    limit = PANEL_WEIGHTS.get(device.type, PANEL_WEIGHTS["cuda"])
    if rows * columns <= limit:
        return rows
    return max(NESTED_RUN, limit // columns // NESTED_RUN * NESTED_RUN)


def panels(packed: Packed, start: int = 0, stop: int | None = None) -> Iterator[tuple[int, Packed]]:
    """(first row, panel) over the rows start .. stop - 1."""
    rows = packed.codes.shape[0]
    stop = rows if stop is None else stop
    step = panel_rows(rows, packed.in_features, packed.codes.device)
    for first in range(start, stop, step):
        yield first, packed.rows(first, min(first + step, stop))


def add_product_(total: Tensor, a: Tensor, b: Tensor) -> None:
    """total += a @ b for a float32 total; the product is not rounded to the dtype of a and b."""
    if total.is_cuda and a.dtype in (torch.float16, torch.bfloat16):
        torch.addmm(total, a, b, out_dtype=torch.float32, out=total)
    else:
        total.addmm_(a.float(), b.float())
