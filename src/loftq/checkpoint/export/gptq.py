"""GPTQ's layout of symmetric integers, as GPTQModel, transformers and vLLM read it.

X.qweight  (in * bits / 32, out) int32: the codes of a column of W.T, a bit stream downwards
X.qzeros   (groups, out * bits / 32) int32: the zeros along a row, stored less one (format v1)
X.scales   (groups, out) float16
X.g_idx    (in,) int32: group of each input

W.T[i, j] = scales[g_idx[i], j] * (code[i, j] - zero[g_idx[i], j]),   zero = 2^(bits-1).
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from loftq.checkpoint.export.layout import Packed, partial_groups, transposed
from loftq.checkpoint.export.words import WORD, pack_words, unpack_words
from loftq.checkpoint.layout import TensorSpec
from loftq.formats import QuantizedTensor, unpack_codes
from loftq.ops.reference import view_bytes

GROUPS = (0, 32, 64, 128)
"""Groups that the kernels of GPTQ and compressed-tensors know; 0 is one scale per row."""


def not_integers(weight: Packed, codings: tuple[str, ...] = ("f16",)) -> str:
    """Formats other than symmetric integers with 16-bit scales in common groups."""
    spec = weight.spec
    if spec.grid != "sint" or spec.scale_coding not in codings:
        kinds = "float16" if codings == ("f16",) else "float16 or bfloat16"
        return f"needs symmetric integers with {kinds} scales, such as sint4-g64-f16"
    if spec.group_size not in GROUPS:
        return "groups must be 32, 64, 128 or channel"
    return ""


class Gptq:
    """Symmetric integers of 2, 3, 4 or 8 bits, several widths in one model if need be."""

    name = "gptq"
    engine = "GPTQ"
    readers: tuple[str, ...] = ("vllm", "transformers")
    one_format = False
    one_coding = True
    advice = "--format sint4-g64-f16 (or --for vllm)"

    def obstacle(self, weight: Packed) -> str:
        """Symmetric integers whose codes and zeros fill whole words."""
        found = not_integers(weight) or partial_groups(weight) or transposed(weight)
        whole_words = not any(size % WORD for size in weight.shape)
        return found or ("" if whole_words else f"sizes must be multiples of {WORD}")

    def tensors(self, weight: Packed) -> list[TensorSpec]:
        """Codes, zeros, scales and group of each input."""
        (rows, columns), bits = weight.shape, weight.spec.bits
        groups = weight.spec.groups(columns)
        return [
            TensorSpec(f"{weight.stem}.qweight", "I32", (columns * bits // WORD, rows)),
            TensorSpec(f"{weight.stem}.qzeros", "I32", (groups, rows * bits // WORD)),
            TensorSpec(f"{weight.stem}.scales", "F16", (groups, rows)),
            TensorSpec(f"{weight.stem}.g_idx", "I32", (columns,)),
        ]

    def pack(self, weight: Packed, stored: QuantizedTensor) -> dict[str, Tensor]:
        """Transpose codes and scales; zeros are 2^(bits-1) - 1 everywhere."""
        (rows, columns), bits = weight.shape, weight.spec.bits
        codes = unpack_codes(stored.weight_packed, columns, bits)
        scales = view_bytes(stored.weight_scale, torch.float16)
        zeros = torch.full((scales.shape[1], rows), 2 ** (bits - 1) - 1, dtype=torch.uint8)
        group = weight.spec.group_size or columns
        return {
            f"{weight.stem}.qweight": pack_words(codes, bits).T.contiguous(),
            f"{weight.stem}.qzeros": pack_words(zeros, bits),
            f"{weight.stem}.scales": scales.T.contiguous(),
            f"{weight.stem}.g_idx": torch.arange(columns, dtype=torch.int32) // group,
        }

    def unpack(self, weight: Packed, tensors: Mapping[str, Tensor]) -> Tensor:
        """scale * (code - (stored zero + 1)), group by g_idx."""
        (rows, columns), bits = weight.shape, weight.spec.bits
        codes = unpack_words(tensors[f"{weight.stem}.qweight"].T.contiguous(), bits, columns)
        zeros = unpack_words(tensors[f"{weight.stem}.qzeros"], bits, rows).T.float() + 1
        scales = tensors[f"{weight.stem}.scales"].T.float()
        group = tensors[f"{weight.stem}.g_idx"].long()
        return (codes.float() - zeros[:, group]) * scales[:, group]

    def config(self, weights: Sequence[Packed], kept: Sequence[str]) -> dict[str, Any]:
        """One width and group for most layers; the others, and those left dense, by name."""
        (bits, group), _ = Counter(map(_width, weights)).most_common(1)[0]
        others: dict[str, dict[str, int]] = {
            f"+:^{re.escape(w.module)}$": {"bits": _width(w)[0], "group_size": _width(w)[1]}
            for w in weights
            if _width(w) != (bits, group)
        }
        left: dict[str, dict[str, int]] = {
            f"-:^{re.escape(module)}$": {} for module in sorted(kept)
        }
        return {
            "quant_method": "gptq",
            "bits": bits,
            "group_size": group,
            "sym": True,
            "desc_act": False,
            "true_sequential": True,
            "lm_head": False,
            "checkpoint_format": "gptq",
            "pack_dtype": "int32",
            "dynamic": others | left,
            # optimum leaves other modules dense by this list alone
            "modules_in_block_to_quantize": [[weight.module for weight in weights]],
            "meta": {"quantizer": ["loftq"]},
        }


def _width(weight: Packed) -> tuple[int, int]:
    return weight.spec.bits, weight.spec.group_size or -1
