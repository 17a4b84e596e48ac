"""Layouts of other engines: the same codes and scales, laid out anew without rounding."""

from loftq.checkpoint.export.bnb import BitsAndBytes
from loftq.checkpoint.export.compressed_tensors import CompressedTensors
from loftq.checkpoint.export.gguf import ARCHITECTURES, GGUF_TYPES, Gguf
from loftq.checkpoint.export.gptq import Gptq
from loftq.checkpoint.export.layout import Layout, Packed, first_obstacle
from loftq.checkpoint.export.readers import NAMES, cannot_read

LAYOUTS: tuple[Layout, ...] = (BitsAndBytes(), Gptq(), CompressedTensors(), Gguf())
"""Every layout that holds packed weights; a new one is a file here and a row in this table."""

__all__ = [
    "ARCHITECTURES",
    "GGUF_TYPES",
    "LAYOUTS",
    "NAMES",
    "BitsAndBytes",
    "CompressedTensors",
    "Gguf",
    "Gptq",
    "Layout",
    "Packed",
    "cannot_read",
    "first_obstacle",
]
