"""Grids: fit the scale of a group, encode values to codes, decode them again.

A rounding method sees a format only through these calls. All work on a stack of weights
(n, out_features, in_features) float32, and scales and zeros are (n, out_features, groups).

Fits, the rule that chooses a group's scale:
    absmax   the smallest scale that clips nothing (the papers' rule)
    mse      the scale with the least squared error over a search (`SEARCH`), clipping outliers
    sigma    mean + 2.5 std per group (`even`) or a clip at mean +- 2 std (`uniform`), as the
             first LoftQ code did; only for reproducing its tables
    entropy  the zero whose codes have the largest entropy (`int`; formats/entropy.py)
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import lru_cache
from typing import Protocol

import torch
from torch import Tensor

from loftq.formats.codebooks import even_levels
from loftq.formats.entropy import most_informative
from loftq.formats.spec import FormatSpec
from loftq.ops.columns import LEAST_SCALE
from loftq.ops.dispatch import fit_kernel, integer_search_kernel, round_kernel, search_kernel
from loftq.ops.reference import PER_TENSOR
from loftq.ops.scale_search import widest_scales

FITS = ("absmax", "mse", "sigma", "entropy")
CHUNK = 1 << 18  # elements worked on at once on a CPU: a few buffers of this size stay in L2
SIGMA_ERROR = "scale_fit=sigma is for the grids `even` and `uniform`; use absmax or mse."
ENTROPY_ERROR = (
    "scale_fit=entropy chooses the zero of each group, and of the grids only `int` stores one; "
    "use absmax or mse, or a format such as int4-g64."
)
BINS = 1 << 12  # of the lookup that replaces a binary search for the nearest level

# Multiples of the absmax scale that the search tries: low widths clip much more.
SEARCH = {
    2: tuple(0.40 + 0.05 * k for k in range(13)),
    3: tuple(0.55 + 0.045 * k for k in range(11)),
    4: tuple(0.70 + 0.035 * k for k in range(10)),
    8: tuple(0.94 + 0.02 * k for k in range(4)),
}


# The rule used when nobody chooses: mse where it is not worse than absmax on STS-B for both
# encoders (docs/benchmarks.md), by grid and width.
DEFAULT_FIT: dict[tuple[str, int], str] = {
    **{("uniform", bits): "sigma" for bits in (2, 3, 4, 8)},
    **{(grid, 4): "absmax" for grid in ("nf", "snf", "int")},
}


def default_fit(spec: FormatSpec) -> str:
    """The fit of a format when neither the user nor the method names one."""
    return DEFAULT_FIT.get((spec.grid, spec.bits), "mse")


def fits_of(spec: FormatSpec) -> tuple[str, ...]:
    """The fits that a format can have."""
    return _FITS_OF.get(spec.grid, ("absmax", "mse"))


_FITS_OF = {
    "int": ("absmax", "mse", "entropy"),
    "even": ("absmax", "mse", "sigma"),
    "uniform": ("absmax", "sigma"),
}


class Grid(Protocol):
    """What a rounding method may know of a format."""

    @property
    def top(self) -> int:
        """Largest code."""

    def codebook(self, device: torch.device) -> Tensor | None:
        """The levels (2^bits,) float32, ascending, or None where codes have zeros taken off."""

    def fit(self, W: Tensor, rule: str) -> tuple[Tensor, Tensor | None]:
        """(scales, zeros or None) of each group of W, before the scales are stored."""

    def encode(self, W: Tensor, scales: Tensor, zeros: Tensor | None) -> Tensor:
        """Nearest codes (uint8) of W under frozen scales and zeros."""

    def decode(self, codes: Tensor, scales: Tensor, zeros: Tensor | None) -> Tensor:
        """Values (float32) of codes."""

    def round(self, W: Tensor, scales: Tensor, zeros: Tensor | None) -> tuple[Tensor, Tensor]:
        """(codes, values): encode and decode in one."""


def grid_of(spec: FormatSpec) -> Grid:
    """The grid of a format."""
    if spec.group_size == PER_TENSOR:
        return TensorUniformGrid(spec.bits)
    if spec.grid == "int":
        return IntegerGrid(spec.bits, spec.group_size)
    if spec.grid == "sint":
        levels = tuple(float(q) - spec.default_zero for q in range(2**spec.bits))
        return CodebookGrid(levels, spec.bits, spec.group_size)
    return CodebookGrid(spec.levels, spec.bits, spec.group_size)


def _views(W: Tensor, group_size: int) -> Iterator[tuple[slice, Tensor]]:
    """W as groups (..., groups, columns): the whole groups, then the shorter last one if any.

    The slice says which groups a view holds.
    """
    columns = W.shape[-1]
    size = group_size or columns
    whole = columns // size
    if whole:
        yield slice(0, whole), W[..., : whole * size].unflatten(-1, (whole, size))
    if columns % size:
        yield slice(whole, whole + 1), W[..., None, whole * size :]


def _by_rows(rows: Tensor, work: Callable[[Tensor], tuple[Tensor, ...]]) -> tuple[Tensor, ...]:
    """work() over (rows, columns) a cache-sized chunk at a time on a CPU; at once elsewhere."""
    step = max(1, CHUNK // rows.shape[-1]) if rows.device.type == "cpu" else rows.shape[0]
    parts = [work(chunk) for chunk in rows.split(step)]
    return tuple(torch.cat(column) for column in zip(*parts, strict=True))


class _GroupedGrid:
    """Shared walk over groups; subclasses say what happens to rows that are one group each."""

    def __init__(self, bits: int, group_size: int) -> None:
        self.bits, self.group_size = bits, group_size

    @property
    def shifts(self) -> int:
        """Zeros that a search tries with each scale, where there are zeros."""
        return 2 if self.bits == 2 else 1

    @property
    def top(self) -> int:
        return 2**self.bits - 1

    def codebook(self, device: torch.device) -> Tensor | None:
        return None

    def fit(self, W: Tensor, rule: str) -> tuple[Tensor, Tensor | None]:
        parts = []
        for _, view in _views(W, self.group_size):
            fitted = self._fit_rows(view.reshape(-1, view.shape[-1]), rule)
            parts.append([column.view(view.shape[:-1]) for column in fitted])
        scales, *zeros = (torch.cat(column, -1) for column in zip(*parts, strict=True))
        return scales, zeros[0] if zeros else None

    def encode(self, W: Tensor, scales: Tensor, zeros: Tensor | None) -> Tensor:
        codes = torch.empty(W.shape, dtype=torch.uint8, device=W.device)
        targets = _views(codes, self.group_size)
        for (groups, view), (_, target) in zip(_views(W, self.group_size), targets, strict=True):
            scale = scales[..., groups, None]
            zero = None if zeros is None else zeros[..., groups, None]
            for x, s, z, out in _chunks(view, scale, zero, target):
                out.copy_(self._encode(x, torch.where(s == 0, LEAST_SCALE, s), z))
        return codes

    def decode(self, codes: Tensor, scales: Tensor, zeros: Tensor | None) -> Tensor:
        values = torch.empty(codes.shape, dtype=torch.float32, device=codes.device)
        targets = _views(values, self.group_size)
        for (groups, view), (_, target) in zip(
            _views(codes, self.group_size), targets, strict=True
        ):
            scale = scales[..., groups, None]
            zero = None if zeros is None else zeros[..., groups, None]
            for x, s, z, out in _chunks(view, scale, zero, target):
                out.copy_(self._decode(x, s, z))
        return values

    def round(self, W: Tensor, scales: Tensor, zeros: Tensor | None) -> tuple[Tensor, Tensor]:
        levels = self.codebook(W.device)
        kernel = round_kernel(W, levels)
        if kernel is None:
            codes = self.encode(W, scales, zeros)
            return codes, self.decode(codes, scales, zeros)
        parts = []
        for groups, view in _views(W, self.group_size):
            rows = view.reshape(-1, view.shape[-1]).contiguous()
            scale = scales[..., groups].reshape(-1)
            zero = None if zeros is None else zeros[..., groups].reshape(-1)
            found = kernel(rows, scale, zero, levels, top=self.top, tiny=LEAST_SCALE)
            parts.append([part.view(view.shape).flatten(-2) for part in found])
        if len(parts) == 1:
            return parts[0][0], parts[0][1]
        codes, values = (torch.cat(column, -1) for column in zip(*parts, strict=True))
        return codes, values

    def _fit_rows(self, rows: Tensor, rule: str) -> tuple[Tensor, ...]:
        levels = self.codebook(rows.device)
        kernel = fit_kernel(rows, levels) if rule in ("absmax", "mse") else None
        if kernel is None:
            return _by_rows(rows, lambda chunk: self._fit(chunk, rule))
        ratios = SEARCH[self.bits] if rule == "mse" else ()
        found = kernel(rows.contiguous(), levels, ratios, top=self.top, shifts=self.shifts)
        return tuple(part for part in found if part is not None)

    def _fit(self, x: Tensor, rule: str) -> tuple[Tensor, ...]:
        raise NotImplementedError

    def _encode(self, x: Tensor, s: Tensor, z: Tensor | None) -> Tensor:
        raise NotImplementedError

    def _decode(self, x: Tensor, s: Tensor, z: Tensor | None) -> Tensor:
        raise NotImplementedError


def _chunks(
    view: Tensor, scale: Tensor, zero: Tensor | None, out: Tensor
) -> Iterator[tuple[Tensor, Tensor, Tensor | None, Tensor]]:
    """Matching slices of (n, rows, groups, columns) tensors along rows, cache-sized on a CPU."""
    per_row = view[0, 0].numel()
    step = max(1, CHUNK // per_row) if view.device.type == "cpu" else view.shape[1]
    stacks = range(len(view)) if view.device.type == "cpu" else [slice(None)]
    for n in stacks:
        for start in range(0, view.shape[1], step):
            at = (n, slice(start, start + step)) if isinstance(n, int) else n
            yield view[at], scale[at], None if zero is None else zero[at], out[at]


class CodebookGrid(_GroupedGrid):
    """w = scale * levels[code]: NormalFloat, IQ4_NL, even levels, symmetric integers."""

    def __init__(self, levels: tuple[float, ...], bits: int, group_size: int) -> None:
        super().__init__(bits, group_size)
        self.levels = levels

    def _fit(self, x: Tensor, rule: str) -> tuple[Tensor, ...]:
        if rule == "sigma":
            if self.levels != even_levels(self.bits):
                raise ValueError(SIGMA_ERROR)
            return (x.mean(-1) + 2.5 * _std(x, -1),)
        if rule == "entropy":
            raise ValueError(ENTROPY_ERROR)
        widest, _ = widest_scales(x, self.levels, self.top)
        if rule == "absmax":
            return (widest,)
        return (self._search(x, widest),)

    def codebook(self, device: torch.device) -> Tensor | None:
        return _lookup(self.levels, device).levels

    def _search(self, x: Tensor, widest: Tensor) -> Tensor:
        """argmin over SEARCH * widest of ||x - scale * nearest level||, per row of x."""
        table = _lookup(self.levels, x.device)
        kernel = search_kernel(x)
        if kernel is not None:
            return kernel(x.contiguous(), widest, table.levels, _ratios(self.bits, x.device))
        unit = x / widest[:, None]
        best = best_error = None
        for ratio in SEARCH[self.bits]:
            nearest = table.nearest(unit, ratio)
            error = torch.linalg.vector_norm(torch.sub(unit, nearest, alpha=ratio), dim=-1)
            if best is None or best_error is None:
                best, best_error = torch.full_like(widest, ratio), error
                continue
            best = torch.where(error < best_error, ratio, best)
            best_error = torch.minimum(best_error, error)
        assert best is not None
        return best * widest

    def _encode(self, x: Tensor, s: Tensor, z: Tensor | None) -> Tensor:
        return _lookup(self.levels, x.device).encode(x / s)

    def _decode(self, x: Tensor, s: Tensor, z: Tensor | None) -> Tensor:
        table = _lookup(self.levels, x.device)
        return torch.index_select(table.levels, 0, x.int().flatten()).view(x.shape) * s


class _Lookup:
    """Nearest level by one look-up in BINS equal bins, instead of a binary search."""

    def __init__(self, levels: tuple[float, ...], device: torch.device) -> None:
        # Made on the host: a copy is finished when it returns, a kernel of one stream is not, and
        # the table is shared by the threads and streams of a device.
        table = torch.tensor(levels, dtype=torch.float32)
        bounds = (table[1:] + table[:-1]) / 2
        self.low, self.per_unit = levels[0], BINS / (levels[-1] - levels[0])
        edges = torch.linspace(levels[0], levels[-1], BINS + 1)
        values = table[torch.bucketize((edges[1:] + edges[:-1]) / 2, bounds)]
        # A bin holds at most one decision bound: the code left of it, and where it lies. The
        # margin keeps a value that rounding put into the neighbouring bin on the right side.
        margin = 1e-3 / self.per_unit
        codes = torch.bucketize(edges[:-1] - margin, bounds, out_int32=True)
        upper = torch.cat([bounds, bounds.new_tensor([torch.inf])])[codes]
        self.levels, self.values = table.to(device), values.to(device)
        self.codes, self.bounds = codes.to(device), upper.to(device)

    def _bins(self, u: Tensor, ratio: float) -> Tensor:
        scaled = torch.add(u.new_tensor(-self.low * self.per_unit), u, alpha=self.per_unit / ratio)
        return scaled.clamp_(0, BINS - 1).int().flatten()

    def nearest(self, u: Tensor, ratio: float) -> Tensor:
        """Level nearest to u / ratio, to within one bin of a decision bound."""
        return torch.index_select(self.values, 0, self._bins(u, ratio)).view(u.shape)

    def encode(self, u: Tensor) -> Tensor:
        """Exactly nearest code (int32), the lower one on a tie."""
        bins = self._bins(u, 1.0)
        left = torch.index_select(self.codes, 0, bins).view(u.shape)
        return left + (u > torch.index_select(self.bounds, 0, bins).view(u.shape))


@lru_cache(maxsize=32)
def _lookup(levels: tuple[float, ...], device: torch.device) -> _Lookup:
    return _Lookup(levels, device)


@lru_cache
def _ratios(bits: int, device: torch.device) -> Tensor:
    return torch.tensor(SEARCH[bits], device=device)


class IntegerGrid(_GroupedGrid):
    """w = scale * (code - zero), zero an integer code: asymmetric min/max rounding.

    The range of a group is widened to hold zero, so that its zero is a code (GPTQ's convention).
    """

    def _fit(self, x: Tensor, rule: str) -> tuple[Tensor, ...]:
        if rule == "sigma":
            raise ValueError(SIGMA_ERROR)
        if rule == "entropy":
            return most_informative(x, self.top)
        scale, zero = widest_scales(x, None, self.top)
        assert zero is not None
        if rule == "absmax":
            return scale, zero
        return self._search(x, scale, zero)

    def _search(self, x: Tensor, widest: Tensor, zero: Tensor) -> tuple[Tensor, Tensor]:
        """argmin over SEARCH * widest, and at 2 bits over two zeros, of the squared error."""
        shifts = self.shifts
        kernel = integer_search_kernel(x)
        if kernel is not None:
            ratios = _ratios(self.bits, x.device)
            return kernel(x.contiguous(), widest, zero, ratios, top=self.top, shifts=shifts)
        best_error = None
        best_scale, best_zero = widest, zero
        for ratio in SEARCH[self.bits]:
            s = widest * ratio
            for shift in range(shifts):
                z = (zero + shift).clamp(0, self.top)
                q = self._encode(x, s[:, None], z[:, None])
                error = (x - self._decode(q, s[:, None], z[:, None])).square_().sum(-1)
                if best_error is None:
                    best_error, best_scale, best_zero = error, s, z
                    continue
                better = error < best_error
                best_error = torch.where(better, error, best_error)
                best_scale = torch.where(better, s, best_scale)
                best_zero = torch.where(better, z, best_zero)
        return best_scale, best_zero

    def _encode(self, x: Tensor, s: Tensor, z: Tensor | None) -> Tensor:
        assert z is not None
        return (x / s + z).round_().clamp_(0, self.top)

    def _decode(self, x: Tensor, s: Tensor, z: Tensor | None) -> Tensor:
        assert z is not None
        return (x - z) * s


class TensorUniformGrid:
    """The uniform quantizer of the LoftQ paper's tables: one affine grid for a whole weight.

    The weight is clipped to mean +- 2 std, and 2^bits levels are spread evenly over what is left.
    """

    def __init__(self, bits: int) -> None:
        self.top = 2**bits - 1

    def codebook(self, device: torch.device) -> Tensor | None:
        return None

    def fit(self, W: Tensor, rule: str) -> tuple[Tensor, Tensor | None]:
        low, high = W.amin((-2, -1)), W.amax((-2, -1))
        if rule == "sigma":
            mean, std = W.mean((-2, -1)), _std(W, (-2, -1))
            low, high = torch.maximum(low, mean - 2 * std), torch.minimum(high, mean + 2 * std)
        elif rule != "absmax":
            raise ValueError(f"scale_fit={rule} does not exist for `uniform`; use sigma or absmax.")
        scale = ((high - low) / self.top).clamp_min_(LEAST_SCALE)
        return scale[:, None, None], (-low / scale)[:, None, None]

    def encode(self, W: Tensor, scales: Tensor, zeros: Tensor | None) -> Tensor:
        assert zeros is not None
        return (W / scales + zeros).round_().clamp_(0, self.top).to(torch.uint8)

    def decode(self, codes: Tensor, scales: Tensor, zeros: Tensor | None) -> Tensor:
        assert zeros is not None
        return (codes - zeros) * scales

    def round(self, W: Tensor, scales: Tensor, zeros: Tensor | None) -> tuple[Tensor, Tensor]:
        codes = self.encode(W, scales, zeros)
        return codes, self.decode(codes, scales, zeros)


def _std(x: Tensor, dim: int | tuple[int, ...]) -> Tensor:
    """Standard deviation, 0 for a single value."""
    count = x[0].numel() if isinstance(dim, tuple) else x.shape[dim]
    return x.std(dim) if count > 1 else torch.zeros_like(x.mean(dim))
