"""Raw tensors in, raw tensors out: what the packed bytes mean and the operators that read them."""

from loftq.ops.reference import decode_scales, dynamic_map, unpack_codes
from loftq.ops.schema import dequantize, quant_linear, quant_linear_lora

__all__ = [
    "decode_scales",
    "dequantize",
    "dynamic_map",
    "quant_linear",
    "quant_linear_lora",
    "unpack_codes",
]
