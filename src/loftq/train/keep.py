"""Blocks that checkpointing leaves alone: they keep their activations and are not computed again.

The last ones, since they are differentiated first and let go of what they kept before the inputs of
the others are read again. A block of a 7B model at 2 x 2048 tokens keeps 0.4 GB more that way.
"""

from __future__ import annotations

from typing import Any

from torch import nn
from transformers import TrainerCallback

from loftq.train.errors import TrainError
from loftq.train.masks import layers_of


class KeptBlocks(TrainerCallback):
    """Leaves the last blocks out when a trainer has switched checkpointing on.

    Args:
        blocks: how many.
    """

    def __init__(self, blocks: int) -> None:
        self.blocks = blocks

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        keep_blocks(kwargs["model"], self.blocks)


def keep_blocks(model: nn.Module, blocks: int) -> None:
    """Switch checkpointing off for the last `blocks` blocks of a model, in place.

    Raises:
        TrainError: the model has fewer.
    """
    layers: list[Any] = layers_of(model)
    if blocks > len(layers):
        raise TrainError(f"keep_blocks={blocks}: the model has {len(layers)} blocks.")
    for layer in layers[len(layers) - blocks :]:
        layer.gradient_checkpointing = False
