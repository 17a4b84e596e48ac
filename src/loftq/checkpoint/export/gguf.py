"""Blocks of 32 weights as GGUF stores them: a float16 scale d, then the codes.

    Q4_0    d, 16 bytes: weight k in the low nibble of byte k, weight k + 16 in the high one;
            w = d * (q - 8)                                                   sint4-g32-f16
    IQ4_NL  the same bytes; w = d * table[q]                                  iq4nl-g32-f16
    Q8_0    d, 32 signed bytes; w = d * q                                     sint8-g32-f16

Q4_1 would add a float16 minimum, which scale * zero of an `int4` group is not in general; the types
below four bits share scales over 256 weights in a coding of their own.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from loftq.checkpoint.export.layout import Packed, partial_groups, transposed
from loftq.checkpoint.layout import TensorSpec
from loftq.formats import QuantizedTensor, parse_format, unpack_codes

BLOCK = 32
GGUF_TYPES = {"sint4-g32-f16": "Q4_0", "iq4nl-g32-f16": "IQ4_NL", "sint8-g32-f16": "Q8_0"}
"""Format -> the GGML type that holds it."""
ARCHITECTURES = {
    "LlamaForCausalLM": "llama",
    "MistralForCausalLM": "llama",
    "Qwen2ForCausalLM": "qwen2",
    "Qwen3ForCausalLM": "qwen3",
}
"""Architectures whose settings and tensor names we translate -> GGUF's name for them."""
BLOCK_BYTES = {"Q4_0": 18, "IQ4_NL": 18, "Q8_0": 34}


class Gguf:
    """Q4_0, IQ4_NL and Q8_0; the types may differ between layers."""

    name = "gguf"
    engine = "GGUF Q4_0 / IQ4_NL / Q8_0"
    readers: tuple[str, ...] = ("llama.cpp",)
    one_format = False
    one_coding = False
    advice = "--format iq4nl-g32-f16 (or --for llama.cpp), sint4-g32-f16 or sint8-g32-f16"

    def obstacle(self, weight: Packed) -> str:
        """One of three formats, in whole blocks."""
        if str(weight.spec) not in GGUF_TYPES:
            *most, last = (f"{name} ({kind})" for name, kind in GGUF_TYPES.items())
            return f"needs {', '.join(most)} or {last}"
        return partial_groups(weight) or transposed(weight)

    def tensors(self, weight: Packed) -> list[TensorSpec]:
        """One tensor of rows of blocks, in bytes."""
        rows, columns = weight.shape
        width = columns // BLOCK * BLOCK_BYTES[GGUF_TYPES[str(weight.spec)]]
        return [TensorSpec(f"{weight.stem}.weight", "U8", (rows, width))]

    def pack(self, weight: Packed, stored: QuantizedTensor) -> dict[str, Tensor]:
        """Scale and codes of each block side by side."""
        rows, columns = weight.shape
        codes = unpack_codes(stored.weight_packed, columns, weight.spec.bits)
        codes = codes.view(rows, -1, BLOCK)
        if weight.spec.bits == 4:
            codes = codes[..., :16] | (codes[..., 16:] << 4)
        else:
            codes = codes ^ 128  # code - 128 as a signed byte
        scales = stored.weight_scale.view(rows, -1, 2)
        return {f"{weight.stem}.weight": torch.cat([scales, codes], -1).flatten(1)}

    def unpack(self, weight: Packed, tensors: Mapping[str, Tensor]) -> Tensor:
        """d times what the type makes of a code."""
        blocks = tensors[f"{weight.stem}.weight"].unflatten(1, (weight.shape[1] // BLOCK, -1))
        d = blocks[..., :2].contiguous().view(torch.float16).float()
        q = blocks[..., 2:]
        kind = GGUF_TYPES[str(weight.spec)]
        if kind == "Q8_0":
            values = q.contiguous().view(torch.int8).float()
        else:
            values = torch.cat([q & 15, q >> 4], -1).float()
            values = values - 8 if kind == "Q4_0" else _table()[values.int()]
        return (values * d).flatten(1)

    def config(self, weights: Sequence[Packed], kept: Sequence[str]) -> dict[str, Any]:
        """None: a GGUF file describes itself."""
        return {}


def _table() -> Tensor:
    return torch.tensor(parse_format("iq4nl").levels, dtype=torch.float32)
