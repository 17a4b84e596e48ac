"""Raw tensors in, raw tensors out: what the packed bytes mean and the operators that read them."""

from loftq.ops.hadamard import hadamard
from loftq.ops.reference import decode_scales, dynamic_map, unpack_codes
from loftq.ops.schema import (
    dequantize,
    descend_columns,
    quant_linear,
    quant_linear_lora,
    round_columns,
)

__all__ = [
    "decode_scales",
    "dequantize",
    "descend_columns",
    "dynamic_map",
    "hadamard",
    "quant_linear",
    "quant_linear_lora",
    "round_columns",
    "unpack_codes",
]
