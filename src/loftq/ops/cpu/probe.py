"""A trial of the library before it is trusted: a small weight of each width, against PyTorch."""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from loftq.ops.columns import nearest
from loftq.ops.cpu.library import Adapter, Library, Projection, Team, make_team, make_weight
from loftq.ops.cpu.rounding import make_grid
from loftq.ops.reference import dequantize_reference, row_bytes, unpack_codes
from loftq.ops.scale_search import fit_scales_reference

ROWS, COLUMNS, GROUP = 5, 75, 16
LEVELS = {2: (-1.0, 0.0, 0.5, 1.0), 3: (), 4: tuple(i / 8 - 1 for i in range(16)), 8: ()}
RATIOS = (0.5, 0.75, 1.0)
ERROR = 1e-5
"""Of a product, relative: sums of 75 float32 products in another order."""


def values_are_right(library: Library, isa: str) -> bool:
    """Whether products, weights and rounding of every width come out right with one `isa`."""
    team = make_team(isa, 1)
    return all(
        _is_right(library, team, bits) and _rounds_right(library, team, bits) for bits in LEVELS
    )


def _is_right(library: Library, team: Team, bits: int) -> bool:
    generator = torch.Generator().manual_seed(bits)
    codes = torch.randint(
        256, (ROWS, row_bytes(COLUMNS, bits)), dtype=torch.uint8, generator=generator
    )
    scales = torch.rand(ROWS, -(-COLUMNS // GROUP), generator=generator) + 0.5
    x = torch.randn(3, COLUMNS, generator=generator)
    middle = 0.0 if LEVELS[bits] else 2.0 ** (bits - 1)
    layout = (bits, GROUP, "f32", LEVELS[bits], middle)
    stored = scales.view(torch.uint8)
    W = dequantize_reference(codes, stored, None, None, COLUMNS, *layout, torch.float32)
    pointers = (codes.data_ptr(), scales.data_ptr(), None, None, None)
    weight = make_weight(pointers, (ROWS, COLUMNS), *layout)
    projection = Projection(weight, Adapter(), None, 0)
    dense, y = torch.full_like(W, torch.nan), torch.full((3, ROWS), torch.nan)
    call, by = library.functions, ctypes.byref
    library.check(call.loftq_dequantize(by(team), by(weight), 0, dense.data_ptr()))
    library.check(call.loftq_project(by(team), by(projection), 1, x.data_ptr(), 3, 0, y.data_ptr()))
    return torch.equal(dense, W) and _is_close(y, x.double() @ W.double().T)


def _is_close(y: Tensor, exact: Tensor) -> bool:
    return bool((y - exact).norm() <= ERROR * exact.norm())


def _rounds_right(library: Library, team: Team, bits: int) -> bool:
    generator = torch.Generator().manual_seed(bits)
    x = torch.randn(ROWS, COLUMNS, generator=generator)
    levels, top = torch.tensor(LEVELS[bits]) if LEVELS[bits] else None, 2**bits - 1
    scales, zeros = torch.full((2, ROWS), torch.nan)
    codes, values = torch.zeros_like(x, dtype=torch.uint8), torch.full_like(x, torch.nan)
    grid = make_grid(levels, COLUMNS, top, RATIOS, 1)
    call, by = library.functions, (ctypes.byref(team), ctypes.byref(grid), x.data_ptr(), ROWS)
    library.check(call.loftq_fit(*by, scales.data_ptr(), zeros.data_ptr()))
    right, first = fit_scales_reference(x, levels, RATIOS, top=top)
    under = (scales.data_ptr(), zeros.data_ptr())
    library.check(call.loftq_round(*by, *under, codes.data_ptr(), values.data_ptr()))
    zero = None if first is None else first[:, None]
    wanted, near = nearest(x, right[:, None], zero, levels, top)
    pairs = ((scales, right), (codes, wanted), (values, near))
    return all(torch.equal(a, b) for a, b in pairs) and _packs_right(library, team, codes, bits)


def _packs_right(library: Library, team: Team, codes: Tensor, bits: int) -> bool:
    packed = torch.zeros(ROWS, row_bytes(COLUMNS, bits), dtype=torch.uint8)
    call = library.functions.loftq_pack
    sizes = (codes.data_ptr(), ROWS, COLUMNS, bits, packed.data_ptr())
    library.check(call(ctypes.byref(team), *sizes))
    return torch.equal(unpack_codes(packed, COLUMNS, bits), codes)
