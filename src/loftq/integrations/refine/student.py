"""The packed model with its adapter, as far as it is on the device."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from loftq.integrations.blocks import LoadedBlocks
from loftq.refine import Batches

if TYPE_CHECKING:
    from peft import PeftModel

ACTIVATIONS = 40
"""Numbers kept for the backward, for each token, block and entry of a hidden state; about."""


class Student(LoadedBlocks):
    """A packed PEFT model in host memory whose blocks visit the device; the rest stays there.

    Args:
        peft: with a trainable adapter.
        device: where it runs.
    """

    def __init__(self, peft: PeftModel, device: torch.device) -> None:
        super().__init__(peft.get_base_model())
        self.peft, self._device = peft, device
        self.module.eval()
        inside = tuple(f"{block}." for block in self.blocks)
        for path, module in self.module.named_modules():
            if path not in self.blocks and not path.startswith(inside):
                module._apply(lambda tensor: tensor.to(device), recurse=False)

    @property
    def device(self) -> torch.device:
        """Where it runs."""
        return self._device

    def load(self, block: str) -> None:
        """Onto the device."""
        self.module.get_submodule(block).to(self.device)

    def drop(self, block: str) -> None:
        """Back to the host."""
        self.module.get_submodule(block).to("cpu")

    @contextmanager
    def whole(self, tokens: int) -> Iterator[None]:
        """Everything on the device, as for a backward over `tokens` tokens."""
        self.module.to(self.device)
        with self._remembering_little(self._is_short(tokens)):
            yield

    def adapter(self, path: str = "") -> dict[str, nn.Parameter]:
        """The adapter's factors inside a module, by path; of all modules for ""."""
        prefix = f"{path}." if path else ""
        named = self.module.named_parameters()
        return {n: p for n, p in named if ".lora_" in n and n.startswith(prefix)}

    def adapted(self, block: str) -> list[str]:
        """Layers of a block that have an adapter, in the order of its modules."""
        found = dict.fromkeys(n.rpartition(".lora_")[0] for n in self.adapter(block))
        return list(found)

    def autocast(self) -> torch.autocast:
        """bfloat16 on a GPU; the factors and all sums stay in float32."""
        return torch.autocast(self.device.type, torch.bfloat16, self.device.type == "cuda")

    def _is_short(self, tokens: int) -> bool:
        """Whether the activations of a batch would take over half of what is free."""
        if self.device.type != "cuda":
            return False
        width = self.module.get_input_embeddings().weight.shape[-1]  # type: ignore[operator]
        needed = 2 * ACTIVATIONS * tokens * width * len(self.blocks)
        return needed > torch.cuda.mem_get_info(self.device)[0] / 2

    @contextmanager
    def _remembering_little(self, short: bool) -> Iterator[None]:
        """Blocks that are run again in the backward instead of keeping what is inside."""
        blocks = [self.module.get_submodule(block) for block in self.blocks] if short else []
        for block in blocks:
            block.forward = partial(checkpoint, block.forward, use_reentrant=False)
        try:
            yield
        finally:
            for block in blocks:
                del block.forward


def pieces_of(ids: Tensor, mask: Tensor, batch: int) -> tuple[list[tuple[Tensor, Tensor]], Batches]:
    """Windows in pieces of one step each, and the numbers to learn from and to hold out.

    An eighth of the pieces, the last, is held out.

    Raises:
        ValueError: fewer than two windows.
    """
    if len(ids) < 2:
        raise ValueError(
            f"refinement: the text gives {len(ids)} window, and one is held out. Give more text, "
            "or a smaller calibration_context."
        )
    size = min(batch, len(ids) // 2)
    pieces = list(zip(ids.split(size), mask.split(size), strict=True))
    kept = len(pieces) - max(1, round(len(pieces) / 8))
    return pieces, (range(kept), range(kept, len(pieces)))
