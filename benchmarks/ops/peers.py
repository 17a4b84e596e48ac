"""Other libraries' 4-bit and 2-bit linear layers, for the rows that ours stand beside.

Each is a function of (shape, tokens, copies, graph_times) that yields (weight, tokens, times,
stored bytes), and nothing where its library is not installed. Their weights are their own
quantization of random values, groups of 64.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterator
from functools import partial

import torch

Row = tuple[str, int, tuple[float, float, float], float]
Copies = Callable[[float], int]
Times = Callable[[list[Callable[[], object]]], tuple[float, float, float]]


def bitsandbytes(
    shape: tuple[int, int], tokens: list[int], copies: Copies, times: Times
) -> Iterator[Row]:
    """NF4, float32 absmax; then its dequantization alone (0 tokens)."""
    if importlib.util.find_spec("bitsandbytes") is None:
        return
    from bitsandbytes import matmul_4bit
    from bitsandbytes.functional import dequantize_4bit, quantize_4bit

    size = shape[0] * shape[1]
    weights = [
        quantize_4bit(_values(shape), quant_type="nf4", blocksize=64)
        for _ in range(copies(size / 2))
    ]
    nbytes = size * (0.5 + 4 / 64)
    for m in tokens:
        x = torch.randn(m, shape[1], device="cuda", dtype=torch.bfloat16)
        calls = [partial(matmul_4bit, x, q.t(), quant_state=s) for q, s in weights]
        yield "nf4 f32", m, times(calls), nbytes
    calls = [partial(dequantize_4bit, q, s) for q, s in weights]
    yield "nf4 f32", 0, times(calls), nbytes + 2 * size


def gemlite(
    shape: tuple[int, int], tokens: list[int], copies: Copies, times: Times
) -> Iterator[Row]:
    """Integers of 4 and 2 bits with zeros, bf16 scales; tuned by itself before it is timed."""
    if importlib.util.find_spec("gemlite") is None:
        return
    from gemlite.core import DType, GemLiteLinearTriton

    size = shape[0] * shape[1]
    for bits in (4, 2):
        layers = []
        for _ in range(copies(size * bits / 8)):
            codes = torch.randint(0, 2**bits, shape, device="cuda").to(torch.uint8)
            scales = torch.rand(size // 64, 1, device="cuda", dtype=torch.bfloat16)
            layer = GemLiteLinearTriton(
                bits, group_size=64, in_features=shape[1], out_features=shape[0],
                input_dtype=DType.BF16, output_dtype=DType.BF16,
            )  # fmt: skip
            layer.pack(codes, scales, torch.rand_like(scales), None)
            layers.append(layer)
        for m in tokens:
            x = torch.randn(m, shape[1], device="cuda", dtype=torch.bfloat16)
            calls = [partial(layer, x) for layer in layers]
            yield f"int{bits}", m, times(calls), size * (bits / 8 + 4 / 64)


def _values(shape: tuple[int, int]) -> torch.Tensor:
    return 0.02 * torch.randn(shape, device="cuda").bfloat16()


PEERS = (bitsandbytes, gemlite)
