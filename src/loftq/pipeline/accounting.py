"""Counting bytes: the paper's compression ratio, and the one a disk or a GPU would measure.

The paper (arXiv:2310.08659, Table 7) divides by the 16-bit size of the *quantized layers only*:

    ratio = (packed weights + 16-bit adapters) / 16-bit weights,   trainable = adapters / weights.

Uniform rows count the codes alone (one scale per tensor); NormalFloat rows add a 16-bit absmax per
64 weights: 2-bit codes are 12.5 %, scales 1.56 %. Embeddings, norms and the head stay out of both
sums. The DeBERTa rows too cover the linears of the blocks only (15.6 = 12.5 + 3.125): with the
embeddings, which were quantized there and given adapters, they would read 15.1. The honest figure,
`whole_model`, counts every byte that has to be stored.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from math import prod

from loftq.formats import FormatSpec, component_shapes
from loftq.pipeline.layout import LayerInfo

ORIGINAL_ITEMSIZE = 2  # bytes of a weight in the 16-bit model that everything is compared with


@dataclass(frozen=True, kw_only=True)
class PaperRatio:
    """The two numbers of a row of the paper's Table 7, as fractions."""

    compression: float
    """(packed weights + adapters) / 16-bit weights, quantized layers only."""
    trainable: float
    """Adapter parameters / weights, quantized layers only."""


@dataclass(frozen=True, kw_only=True)
class WholeModel:
    """Every byte of a packed model with its adapters, against the same model at 16 bits."""

    packed_bytes: int
    """Codes, scales, zeros and nested constants of the quantized layers."""
    rest_bytes: int
    """What stays unquantized: embeddings, head, norms, biases, buffers on disk."""
    adapter_bytes: int
    """LoRA A and B of the quantized layers."""
    original_bytes: int
    """The model before, at 16 bits a weight."""

    @property
    def total_bytes(self) -> int:
        """Packed + rest + adapters."""
        return self.packed_bytes + self.rest_bytes + self.adapter_bytes

    @property
    def ratio(self) -> float:
        """Total bytes / original bytes."""
        return self.total_bytes / self.original_bytes


def packed_bytes(layer: LayerInfo, spec: FormatSpec) -> int:
    """Stored bytes of one quantized layer, row padding included."""
    return sum(prod(shape) for shape in component_shapes(spec, layer.shape).values())


def adapter_parameters(layer: LayerInfo, rank: int) -> int:
    """Parameters of A (rank, in) and B (out, rank), for linears and embeddings alike."""
    return rank * sum(layer.shape)


def paper_ratio(
    layers: Iterable[LayerInfo],
    formats: Mapping[str, FormatSpec],
    rank: int,
    *,
    adapter_itemsize: int = 2,
) -> PaperRatio:
    """Compression and trainable ratio as the paper counts them.

    Args:
        layers: the quantized layers; leave embeddings out for the paper's DeBERTa rows.
        formats: module path -> format. `uniform2` reproduces the uniform rows, `nf2-g64-f16` the
            NormalFloat ones.
        rank: of the adapters.
        adapter_itemsize: bytes of an adapter parameter; 2 in the paper.
    """
    layers = list(layers)
    weights = sum(prod(layer.shape) for layer in layers)
    adapters = sum(adapter_parameters(layer, rank) for layer in layers)
    packed = sum(packed_bytes(layer, formats[layer.module]) for layer in layers)
    return PaperRatio(
        compression=(packed + adapter_itemsize * adapters) / (ORIGINAL_ITEMSIZE * weights),
        trainable=adapters / weights,
    )


def whole_model(
    layers: Iterable[LayerInfo],
    formats: Mapping[str, FormatSpec],
    rank: int,
    *,
    rest_parameters: int,
    rest_itemsize: int = 2,
    adapter_itemsize: int = 4,
) -> WholeModel:
    """Every byte: packed layers, the rest as it is stored, and the adapters.

    Args:
        layers: the quantized layers, each stored weight once.
        formats: module path -> format.
        rank: of the adapters; 0 counts the backbone alone.
        rest_parameters: parameters outside of `layers`; a tied head is one with its embedding.
        rest_itemsize: bytes per parameter of the rest.
        adapter_itemsize: bytes of an adapter parameter: 4 as we store them, 2 to compare with the
            paper.
    """
    layers = list(layers)
    weights = sum(prod(layer.shape) for layer in layers)
    return WholeModel(
        packed_bytes=sum(packed_bytes(layer, formats[layer.module]) for layer in layers),
        rest_bytes=rest_itemsize * rest_parameters,
        adapter_bytes=adapter_itemsize * sum(adapter_parameters(layer, rank) for layer in layers),
        original_bytes=ORIGINAL_ITEMSIZE * (weights + rest_parameters),
    )
