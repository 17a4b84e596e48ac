"""A transformers model as `calibration.BlockModel`: its blocks come and go, the rest stays.

Only the base model runs, never a head: no logits are made.
"""

from __future__ import annotations

import inspect
import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn

from loftq.checkpoint import Checkpoint
from loftq.integrations.discover import SourceError, build_model
from loftq.integrations.structure import examine
from loftq.integrations.tensor_names import find_tensors

RUN_DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}


class LoadedBlocks:
    """A model that is in memory whole: nothing comes or goes.

    Args:
        model: any transformers model.
    """

    def __init__(self, model: nn.Module) -> None:
        self.module, self.anatomy = model, examine(model)
        self.blocks: Sequence[str] = tuple(self.anatomy.blocks)

    @property
    def device(self) -> torch.device:
        """Where its first weight is."""
        return next(self.module.parameters()).device

    @property
    def reenters(self) -> bool:
        """Whether a forward enters a block several times: fewer blocks than layers."""
        config = getattr(self.module, "config", None)
        return int(getattr(config, "num_hidden_layers", 0) or 0) > len(self.blocks)

    def load(self, block: str) -> None:
        """Already there."""

    def drop(self, block: str) -> None:
        """Stays there."""

    def forward(self, ids: Tensor, mask: Tensor) -> object:
        """The base model's forward; a decoder behind an encoder reads the same text."""
        base = self.module.get_submodule(self.anatomy.base)
        inputs: dict[str, Any] = {"input_ids": ids.to(self.device)}
        if not mask.all():
            inputs["attention_mask"] = mask.long().to(self.device)
        if getattr(getattr(base, "config", None), "is_encoder_decoder", False):
            inputs["decoder_input_ids"] = inputs["input_ids"]
            if "attention_mask" in inputs:
                inputs["decoder_attention_mask"] = inputs["attention_mask"]
        if "use_cache" in inspect.signature(base.forward).parameters:
            inputs["use_cache"] = False  # keys and values of all tokens would be kept
        return base(**inputs)


class CheckpointBlocks(LoadedBlocks):
    """A model on disk: one block at a time is read from the checkpoint onto the device.

    Beside a GPU the next block is read into pinned memory while the current one runs.

    Args:
        folder: holds config.json.
        source: the weights.
        device: where to run. On a CPU in float32, elsewhere in the 16- or 32-bit dtype that most
            of the weights are stored in: a checkpoint may keep its norms in another.

    Raises:
        SourceError: weights that transformers converts while loading, or a block without weights.
    """

    def __init__(self, folder: Path, source: Checkpoint, device: torch.device) -> None:
        from accelerate import init_empty_weights  # type: ignore[import-untyped]

        # Parameters without memory, buffers (rotary tables, position ids) with their values.
        with init_empty_weights(include_buffers=False):
            model = build_model(folder)
        super().__init__(model.eval())
        self.source, self._device = source, device
        self.names = find_tensors(model, source.tensors)
        for module in model.modules():
            for name, buffer in module.named_buffers(recurse=False):
                module._buffers[name] = buffer.to(device)
        self._reader = ThreadPoolExecutor(1, thread_name_prefix="read")
        self._ahead: dict[str, Future[dict[str, Tensor]]] = {}
        self.dtype = torch.float32 if device.type == "cpu" else self._commonest_dtype()
        inside = tuple(f"{block}." for block in self.blocks)
        for name in self._parameters():
            if not name.startswith(inside) and self.anatomy.in_base(name):
                self._place(name, required=False)

    @property
    def device(self) -> torch.device:
        """Where it runs."""
        return self._device

    def load(self, block: str) -> None:
        """Read the block's weights."""
        ahead = self._ahead.pop(block, None)
        there = {} if ahead is None else ahead.result()
        for name in self._parameters(f"{block}."):
            self._place(name, required=True, there=there)
        if self.device.type == "cuda":
            self._read_ahead(self.blocks.index(block) + 1)

    def drop(self, block: str) -> None:
        """Back to parameters without memory."""
        for name in self._parameters(f"{block}."):
            holder, leaf = self._holder(name)
            empty = torch.empty_like(holder.get_parameter(leaf), device="meta")
            holder._parameters[leaf] = _frozen(empty)

    def load_head(self) -> None:
        """Give the output head its weights, which no forward of the base needs.

        Raises:
            SourceError: the checkpoint has none.
        """
        for path in self.anatomy.heads:
            for name in self._parameters(f"{path}."):
                self._place(name, required=True)

    def _read_ahead(self, following: int) -> None:
        """Begin to read the block of this number, if there is one."""
        if following == len(self.blocks):
            return
        block = self.blocks[following]
        names = [self._stored(name) for name in self._parameters(f"{block}.")]
        self._ahead[block] = self._reader.submit(
            lambda: {name: self.source.read(name).pin_memory() for name in names if name}
        )

    def _stored(self, name: str) -> str | None:
        """The tensor of the checkpoint that a parameter is read from."""
        return self.names.sources.get(name) or self.names.sources.get(self._owner(name))

    def _parameters(self, prefix: str = "") -> Iterator[str]:
        named = list(self.module.named_parameters(remove_duplicate=False))
        return (name for name, _ in named if name.startswith(prefix))

    def _place(
        self, name: str, *, required: bool, there: Mapping[str, Tensor] = MappingProxyType({})
    ) -> None:
        """Put a parameter onto the device, from `there` (pinned, by stored name) or the file."""
        holder, leaf = self._holder(name)
        found = self._stored(name)
        if found is not None:
            weight = there[found] if found in there else self.source.read(found)
            weight = weight.to(self.device, non_blocking=weight.is_pinned())
            holder._parameters[leaf] = _frozen(weight.to(self.dtype))
        elif required:
            why = "is converted while loading" if name in self.names.converted else "is not there"
            raise SourceError(
                f"{name}: {why}, so that blocks cannot be read one by one. Load the model yourself "
                "and call loftq.quantize_model, or choose a method that needs no data."
            )
        else:  # a part that the checkpoint leaves to be made anew, a pooler
            shape = holder.get_parameter(leaf).shape
            zeros = torch.zeros(shape, dtype=self.dtype, device=self.device)
            holder._parameters[leaf] = _frozen(zeros)

    def _commonest_dtype(self) -> torch.dtype:
        """Of the weights as they are stored; the wider one on a tie."""
        stored: Counter[str] = Counter(dict.fromkeys(RUN_DTYPES, 0))
        for found in self.names.sources.values():
            entry = self.source.tensors[found]
            stored[entry.dtype] += math.prod(entry.shape)
        return RUN_DTYPES[max(RUN_DTYPES, key=lambda name: stored[name])]

    def _owner(self, name: str) -> str:
        """The parameter that a tied one shares its tensor with."""
        path, _, leaf = name.rpartition(".")
        return f"{self.anatomy.tied.get(path, path)}.{leaf}"

    def _holder(self, name: str) -> tuple[nn.Module, str]:
        path, _, leaf = name.rpartition(".")
        return self.module.get_submodule(path), leaf


def _frozen(tensor: Tensor) -> nn.Parameter:
    return nn.Parameter(tensor, requires_grad=False)
