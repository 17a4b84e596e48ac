"""One token through a whole Llama-like model in the library: structures of csrc/loftq_cpu.h."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from loftq.ops.cpu.library import (
    DTYPES,
    Library,
    Projection,
    Team,
    current_team,
    find_library,
    level_array,
)
from loftq.ops.cpu.library import Weight as WeightStructure
from loftq.ops.cpu.linear import NO_ADAPTER, adapter_key, make_projection

DENSE = 0
"""`bits` of a weight that is not packed."""


class Block(ctypes.Structure):
    """loftq_block."""

    _fields_ = (
        ("attention_norm", ctypes.c_void_p), ("mlp_norm", ctypes.c_void_p),
        ("q_norm", ctypes.c_void_p), ("k_norm", ctypes.c_void_p),
        ("qkv", Projection * 3), ("o", Projection), ("gate_up", Projection * 2),
        ("down", Projection), ("keys", ctypes.c_void_p), ("values", ctypes.c_void_p),
    )  # fmt: skip


class Decoder(ctypes.Structure):
    """loftq_decoder."""

    _fields_ = (
        ("blocks", ctypes.c_void_p), ("count", ctypes.c_int64), ("norm", ctypes.c_void_p),
        ("head", Projection), ("cosine", ctypes.c_void_p), ("sine", ctypes.c_void_p),
        ("hidden", ctypes.c_int64), ("heads", ctypes.c_int64), ("kv_heads", ctypes.c_int64),
        ("head_size", ctypes.c_int64), ("capacity", ctypes.c_int64),
        ("epsilon", ctypes.c_float), ("scaling", ctypes.c_float), ("cache_dtype", ctypes.c_int32),
    )  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Linear:
    """One linear layer, packed or dense, with at most one adapter; all tensors on the CPU."""

    parts: Sequence[Tensor | None]
    """Codes, scales, zeros and nested constants; or the dense weight alone."""
    in_features: int
    layout: tuple | None
    """`PackedLayer.layout`; None for a dense weight."""
    adapter: tuple[Tensor, Tensor, float] | None = None
    """A (rank, in_features), B (out_features, rank) and the scaling."""
    bias: Tensor | None = None

    def projection(self) -> Projection:
        """Its structure, right as long as the tensors stay where they are."""
        adapter = NO_ADAPTER if self.adapter is None else adapter_key(*self.adapter)
        if self.layout is not None:
            return make_projection(self.parts, self.in_features, self.layout, adapter, self.bias)
        (weight,) = self.parts
        assert weight is not None
        bias = (None, 0) if self.bias is None else (self.bias.data_ptr(), DTYPES[self.bias.dtype])
        return Projection(_dense(weight), adapter, *bias)


@dataclass(frozen=True, kw_only=True)
class BlockTensors:
    """What one block is made of; norms are float32."""

    attention_norm: Tensor
    mlp_norm: Tensor
    head_norms: tuple[Tensor, Tensor] | None
    """Of every head of q and of k, (head_size); None where the family has none."""
    linears: Sequence[Linear]
    """q, k, v, o, gate, up, down."""


@dataclass(frozen=True, kw_only=True)
class ModelTensors:
    """A model whose step the library can take."""

    blocks: Sequence[BlockTensors]
    norm: Tensor
    head: Linear
    cosine: Tensor
    """(capacity, head_size) float32, as `sine`."""
    sine: Tensor
    epsilon: float
    scaling: float
    """Of q k."""


class TokenStep:
    """Takes a model one token further, over a cache of its own.

    Args:
        model: its tensors, kept alive here; they must not move meanwhile.
        keys: (blocks, kv_heads, capacity, head_size) of float32, float16 or bfloat16.
        values: alike.
    """

    def __init__(self, model: ModelTensors, keys: Tensor, values: Tensor) -> None:
        library = find_library()
        assert library is not None, "the caller asks first"
        self._library: Library = library
        self.model, self.keys, self.values = model, keys, values
        self._blocks = (Block * len(model.blocks))()
        for i, block in enumerate(model.blocks):
            self._blocks[i] = _block(block, keys[i], values[i])
        _, kv_heads, capacity, head_size = keys.shape
        hidden, queries = model.norm.shape[0], len(model.blocks[0].linears[0].parts[0])  # type: ignore[arg-type]
        self._decoder = Decoder(
            ctypes.addressof(self._blocks), len(model.blocks), model.norm.data_ptr(),
            model.head.projection(), model.cosine.data_ptr(), model.sine.data_ptr(),
            hidden, queries // head_size, kv_heads, head_size, capacity,
            model.epsilon, model.scaling, DTYPES[keys.dtype],
        )  # fmt: skip
        self._rows = self._decoder.head.weight.rows

    def __call__(self, embedding: Tensor, position: int) -> Tensor:
        """Logits (vocabulary) float32 after the token at `position`, from 0; the cache grows by it.

        Args:
            embedding: (hidden) of the token, any float dtype.
        """
        x = embedding.detach().to(torch.float32, copy=True).contiguous()
        logits = torch.empty(self._rows)
        team: Team = current_team(self._library)
        self._library.check(
            self._library.functions.loftq_step(
                ctypes.byref(team), ctypes.byref(self._decoder), position,
                x.data_ptr(), logits.data_ptr(),
            )
        )  # fmt: skip
        return logits


def _block(block: BlockTensors, keys: Tensor, values: Tensor) -> Block:
    q, k, v, o, gate, up, down = (linear.projection() for linear in block.linears)
    heads = block.head_norms or (None, None)
    q_norm, k_norm = (None if norm is None else norm.data_ptr() for norm in heads)
    return Block(
        block.attention_norm.data_ptr(), block.mlp_norm.data_ptr(), q_norm, k_norm,
        (Projection * 3)(q, k, v), o, (Projection * 2)(gate, up), down,
        keys.data_ptr(), values.data_ptr(),
    )  # fmt: skip


def _dense(weight: Tensor) -> WeightStructure:
    return WeightStructure(
        weight.data_ptr(), None, None, None, None, *weight.shape,
        DENSE, 0, DTYPES[weight.dtype], 0, 0.0, level_array(()),
    )  # fmt: skip
