"""The nearest code of values under stored scales, as every rounding kernel computes it.

Divisions are IEEE; with `enable_fp_fusion=False` codes and values are bit for bit those of
`columns.nearest`.
"""

import triton
import triton.language as tl

HALF_EVEN = tl.constexpr(12582912.0)  # 1.5 * 2^23: adding it rounds a small float to an integer


@triton.jit
def nearest(x, scale, zero, levels_ptr, tiny, top, LEVELS: tl.constexpr):  # type: ignore[no-untyped-def]  # arguments are Triton's
    """(codes int32, values float32) of x; scale and zero have its shape or broadcast to it.

    LEVELS: entries of the codebook at levels_ptr, or 0 for an integer grid 0 .. top with zeros.
    """
    unit = tl.div_rn(x, tl.where(scale == 0, tiny, scale) + tl.zeros_like(x))
    if LEVELS > 0:
        low = tl.load(levels_ptr)
        codes = tl.zeros(unit.shape, tl.int32)
        level = tl.zeros_like(unit) + low
        for i in tl.static_range(1, LEVELS):
            high = tl.load(levels_ptr + i)
            above = unit > (high + low) * 0.5
            codes = tl.where(above, i, codes)
            level = tl.where(above, high, level)
            low = high
        values = level * scale
    else:
        code = tl.minimum(tl.maximum(unit + zero, 0.0), top)
        code = (code + HALF_EVEN) - HALF_EVEN
        codes = code.to(tl.int32)
        values = (code - zero) * scale
    return codes, values
