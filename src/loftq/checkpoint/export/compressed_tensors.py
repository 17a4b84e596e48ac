"""The `pack-quantized` layout of compressed-tensors, vLLM's own.

X.weight_packed  (out, ceil(in * bits / 32)) int32: the codes of a row, a bit stream
X.weight_scale   (out, groups) float16 or bfloat16
X.weight_shape   (2,) int64

W[i, j] = scale[i, j // group] * (code[i, j] - 2^(bits-1)).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from loftq.checkpoint.export.gptq import not_integers
from loftq.checkpoint.export.layout import Packed, partial_groups, transposed
from loftq.checkpoint.export.words import WORD, pack_words, unpack_words
from loftq.checkpoint.layout import TensorSpec
from loftq.formats import FormatSpec, QuantizedTensor, unpack_codes
from loftq.ops.reference import SCALE_DTYPES, spread, view_bytes

CODINGS = {"f16": "F16", "bf16": "BF16"}


class CompressedTensors:
    """Symmetric integers of 2, 3, 4 or 8 bits, several widths in one model if need be."""

    name = "compressed-tensors"
    engine = "compressed-tensors"
    readers: tuple[str, ...] = ("vllm", "transformers")
    one_format = False
    one_coding = True
    advice = "--format sint4-g64-f16 (or --for vllm)"

    def obstacle(self, weight: Packed) -> str:
        """Symmetric integers in whole groups; scales of either 16-bit kind."""
        return not_integers(weight, tuple(CODINGS)) or partial_groups(weight) or transposed(weight)

    def tensors(self, weight: Packed) -> list[TensorSpec]:
        """Codes, scales and the shape that the codes unpack to."""
        (rows, columns), spec = weight.shape, weight.spec
        words = -(-columns * spec.bits // WORD)
        scales = (rows, spec.groups(columns))
        return [
            TensorSpec(f"{weight.stem}.weight_packed", "I32", (rows, words)),
            TensorSpec(f"{weight.stem}.weight_scale", CODINGS[spec.scale_coding], scales),
            TensorSpec(f"{weight.stem}.weight_shape", "I64", (2,)),
        ]

    def pack(self, weight: Packed, stored: QuantizedTensor) -> dict[str, Tensor]:
        """Codes into words; scales are a view of what we store."""
        codes = unpack_codes(stored.weight_packed, weight.shape[1], weight.spec.bits)
        scales = view_bytes(stored.weight_scale, SCALE_DTYPES[weight.spec.scale_coding])
        return {
            f"{weight.stem}.weight_packed": pack_words(codes, weight.spec.bits),
            f"{weight.stem}.weight_scale": scales,
            f"{weight.stem}.weight_shape": torch.tensor(weight.shape),
        }

    def unpack(self, weight: Packed, tensors: Mapping[str, Tensor]) -> Tensor:
        """scale * (code - 2^(bits-1))."""
        bits = weight.spec.bits
        rows, columns = tensors[f"{weight.stem}.weight_shape"].tolist()
        codes = unpack_words(tensors[f"{weight.stem}.weight_packed"], bits, columns)
        scales = tensors[f"{weight.stem}.weight_scale"].float()
        values = codes.float() - 2 ** (bits - 1)
        return (values * spread(scales, columns, weight.spec.group_size)).view(rows, columns)

    def config(self, weights: Sequence[Packed], kept: Sequence[str]) -> dict[str, Any]:
        """One group of settings for a format; all linears, or layers by name if there are more."""
        specs = sorted({weight.spec for weight in weights}, key=str)
        named = len(specs) > 1
        groups = {
            f"group_{k}": {
                "targets": [w.module for w in weights if w.spec == spec] if named else ["Linear"],
                "weights": _scheme(spec),
                "input_activations": None,
                "output_activations": None,
            }
            for k, spec in enumerate(specs)
        }
        return {
            "quant_method": "compressed-tensors",
            "format": "pack-quantized",
            "quantization_status": "compressed",
            "config_groups": groups,
            "ignore": sorted(kept),
            "kv_cache_scheme": None,
            "global_compression_ratio": None,
        }


def _scheme(spec: FormatSpec) -> dict[str, Any]:
    grouped = spec.group_size > 0
    return {
        "num_bits": spec.bits,
        "type": "int",
        "symmetric": True,
        "strategy": "group" if grouped else "channel",
        "group_size": spec.group_size if grouped else None,
        "dynamic": False,
        "actorder": None,
    }
