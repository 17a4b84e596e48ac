"""Checkpoints on disk: safetensors read with every header checked, written so a kill costs nothing.

The packed layout is fixed byte by byte in SPEC.md, beside this file.
"""

from loftq.checkpoint.header import DTYPE_NAMES, DTYPES, CheckpointError, TensorEntry
from loftq.checkpoint.layout import ShardFile, TensorSpec, plan_shards
from loftq.checkpoint.lineage import backbone_hash
from loftq.checkpoint.reader import Checkpoint, open_checkpoint
from loftq.checkpoint.writer import CheckpointWriter

__all__ = [
    "DTYPES",
    "DTYPE_NAMES",
    "Checkpoint",
    "CheckpointError",
    "CheckpointWriter",
    "ShardFile",
    "TensorEntry",
    "TensorSpec",
    "backbone_hash",
    "open_checkpoint",
    "plan_shards",
]
