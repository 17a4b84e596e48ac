"""The device that rows of training were measured on, and its memory given back between them."""

from __future__ import annotations

import gc

import torch


def release() -> None:
    """Give back what a row has left."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def machine(device: str) -> str:
    """Device and versions, for the head of a table."""
    import transformers

    name = torch.cuda.get_device_name() if device == "cuda" else "CPU"
    return f"{name}, torch {torch.__version__}, transformers {transformers.__version__}"
