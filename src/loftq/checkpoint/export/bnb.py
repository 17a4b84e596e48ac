"""bitsandbytes NF4: two codes a byte, one scale per block of the flattened weight.

    X.weight                                   (numel / 2, 1) uint8, code 2k in the high nibble
    X.weight.absmax                            one float32 a block, or one byte ("dq")
    X.weight.quant_map                         the 16 levels, float32
    X.weight.nested_absmax, .nested_quant_map  "dq" only: float32 per 256 blocks, and the byte map
    X.weight.quant_state.bitsandbytes__nf4     JSON: type, block size, dtype, shape, nested offset

The levels, the nested coding and its map are ours to the bit, so that only nibbles change places.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from loftq.checkpoint.export.layout import Packed, partial_groups, transposed
from loftq.checkpoint.layout import TensorSpec
from loftq.formats import QuantizedTensor
from loftq.ops.reference import NESTED_RUN, dynamic_map, view_bytes

BLOCKS = (64, 128, 256)
STATE = "weight.quant_state.bitsandbytes__nf4"
STATE_BYTES = 256
"""The JSON is padded with spaces to this length: known before the offset in it is read."""


class BitsAndBytes:
    """NF4, with nested or float32 scales.

    Args:
        dtype: what the engine dequantizes into: the model's own dtype.
    """

    name = "bnb"
    engine = "bitsandbytes NF4"
    readers: tuple[str, ...] = ("transformers", "vllm")
    one_format = True
    one_coding = True
    advice = "--format nf4-g64-dq (or --for transformers)"

    def __init__(self, dtype: str = "float32") -> None:
        self.dtype = dtype

    def obstacle(self, weight: Packed) -> str:
        """nf4 in whole blocks of a size that the engine has."""
        spec = weight.spec
        if (spec.grid, spec.bits) != ("nf", 4):
            return "its only 4-bit NormalFloat is nf4"
        if spec.scale_coding not in ("dq", "f32"):
            return "scales must be -dq or -f32"
        if spec.group_size not in BLOCKS:
            return f"groups must be {', '.join(map(str, BLOCKS))}"
        return partial_groups(weight) or transposed(weight)

    def tensors(self, weight: Packed) -> list[TensorSpec]:
        """Codes, scales, levels, and the state that describes them."""
        count = weight.shape[0] * weight.shape[1]
        blocks = count // weight.spec.group_size
        nested = weight.spec.scale_coding == "dq"
        shapes: dict[str, tuple[str, tuple[int, ...]]] = {
            "weight": ("U8", (count // 2, 1)),
            "weight.absmax": ("U8" if nested else "F32", (blocks,)),
            "weight.quant_map": ("F32", (16,)),
            STATE: ("U8", (STATE_BYTES,)),
        }
        if nested:
            shapes["weight.nested_absmax"] = ("F32", (-(-blocks // NESTED_RUN),))
            shapes["weight.nested_quant_map"] = ("F32", (256,))
        return [TensorSpec(f"{weight.stem}.{k}", *place) for k, place in shapes.items()]

    def pack(self, weight: Packed, stored: QuantizedTensor) -> dict[str, Tensor]:
        """Swap the nibbles; everything else is a view of what we store."""
        packed = stored.weight_packed
        found = {
            "weight": ((packed << 4) | (packed >> 4)).view(-1, 1),
            "weight.absmax": stored.weight_scale.flatten(),
            "weight.quant_map": torch.tensor(stored.spec.levels, dtype=torch.float32),
        }
        offset = None
        if stored.weight_nested is not None:
            constants = view_bytes(stored.weight_nested, torch.float32)
            offset = constants[0].item()
            found["weight.nested_absmax"] = constants[1:].clone()
            found["weight.nested_quant_map"] = dynamic_map()
        else:
            found["weight.absmax"] = view_bytes(stored.weight_scale, torch.float32).flatten()
        found[STATE] = self._state(weight, offset)
        return {f"{weight.stem}.{name}": tensor for name, tensor in found.items()}

    def unpack(self, weight: Packed, tensors: Mapping[str, Tensor]) -> Tensor:
        """level[code] * absmax, where a nested absmax is map[byte] * nested_absmax + offset."""
        part = {k.removeprefix(f"{weight.stem}."): t for k, t in tensors.items()}
        state = json.loads(bytes(part[STATE].tolist()))
        scales = part["weight.absmax"]
        if "nested_offset" in state:
            runs = torch.arange(scales.numel()) // state["nested_blocksize"]
            scales = part["weight.nested_quant_map"][scales.long()]
            scales = scales * part["weight.nested_absmax"][runs] + state["nested_offset"]
        codes = part["weight"].flatten()
        pairs = torch.stack([codes >> 4, codes & 15], -1).view(-1, state["blocksize"])
        values = part["weight.quant_map"][pairs.int()] * scales[:, None]
        return values.view(state["shape"])

    def config(self, weights: Sequence[Packed], kept: Sequence[str]) -> dict[str, Any]:
        """As BitsAndBytesConfig writes it."""
        return {
            "quant_method": "bitsandbytes",
            "load_in_4bit": True,
            "load_in_8bit": False,
            "bnb_4bit_quant_type": "nf4",
            "bnb_4bit_use_double_quant": weights[0].spec.scale_coding == "dq",
            "bnb_4bit_compute_dtype": self.dtype,
            "bnb_4bit_quant_storage": "uint8",
            "llm_int8_skip_modules": sorted(kept),
        }

    def _state(self, weight: Packed, offset: float | None) -> Tensor:
        state: dict[str, Any] = {
            "quant_type": "nf4",
            "blocksize": weight.spec.group_size,
            "dtype": self.dtype,
            "shape": list(weight.shape),
        }
        if offset is not None:
            state |= {
                "nested_blocksize": NESTED_RUN,
                "nested_dtype": "float32",
                "nested_offset": offset,
            }
        text = json.dumps(state).encode()
        assert len(text) <= STATE_BYTES, text
        return torch.tensor(list(text.ljust(STATE_BYTES)), dtype=torch.uint8)
