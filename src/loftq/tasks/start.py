"""What a run on a task starts from: a packed model, or the original one as a baseline."""

from __future__ import annotations

import shutil
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import nn

from loftq import api
from loftq.integrations.discover import load_config
from loftq.integrations.heads import Headed, attach_fresh, attach_start, load_headed
from loftq.integrations.run_folder import RunFolder
from loftq.integrations.source import resolve_source
from loftq.pipeline.config import QuantizeConfig
from loftq.tasks.base import Task, TaskError
from loftq.tasks.config import Chosen
from loftq.train.base import Base
from loftq.train.closing import write_adapter

WIDTH = 2
"""Bytes of a weight of the 16-bit parts, whatever the files of the source hold."""


@dataclass(frozen=True, kw_only=True)
class Start(ABC):
    """A model to be fine-tuned."""

    base: Base
    """For baselines `folder` is the original model and `backbone` is ""."""
    kind: ClassVar[str]

    def record(self) -> dict[str, str]:
        """base.json."""
        return self.base.record()

    @abstractmethod
    def load(self, task: Task, *, seed: int, dtype: torch.dtype, place: Mapping[str, Any]) -> Any:
        """The model in the class of the task, what is trained taking gradients in float32."""

    @abstractmethod
    def save(self, run: RunFolder, model: Any, tokenizer: Any) -> None:
        """What was trained, into the run's folder; it appears when it is whole."""

    @abstractmethod
    def sizes(self, model: nn.Module) -> dict[str, int]:
        """Bytes by part: backbone (packed), kept (16-bit), adapter (with the head, 16-bit)."""

    def _headed(self, task: Task, seed: int, **options: Any) -> tuple[Headed, str]:
        folder = self.base.folder
        auto = task.auto_class(load_config(folder))
        options |= task.head_options()
        return load_headed(folder, auto, new_head=task.new_head, seed=seed, **options), auto


@dataclass(frozen=True, kw_only=True)
class PackedStart(Start):
    """A packed backbone and an adapter that belongs to it."""

    kind: ClassVar[str] = "packed"

    def load(self, task: Task, *, seed: int, dtype: torch.dtype, place: Mapping[str, Any]) -> Any:
        headed, auto = self._headed(task, seed, dtype=dtype, **place)
        return attach_start(headed, self.base.adapter, auto)

    def save(self, run: RunFolder, model: Any, tokenizer: Any) -> None:
        write_adapter(run, model, tokenizer, self.base.backbone)

    def sizes(self, model: nn.Module) -> dict[str, int]:
        packed, kept, trained = 0, 0, 0
        for parameter in model.parameters():
            if parameter.dtype == torch.uint8:
                packed += parameter.numel()
            elif parameter.requires_grad:
                trained += WIDTH * parameter.numel()
            else:
                kept += WIDTH * parameter.numel()
        return {"backbone": packed, "kept": kept - _replaced(model), "adapter": trained}


@dataclass(frozen=True, kw_only=True)
class LoraStart(Start):
    """The original model with a fresh LoRA on the layers that a quantization would pack."""

    options: Mapping[str, Any]
    """Fields of QuantizeConfig: rank, alpha, rslora, targets, skip."""
    kind: ClassVar[str] = "lora16"

    def record(self) -> dict[str, str]:
        return {**super().record(), "baseline": self.kind}

    def load(self, task: Task, *, seed: int, dtype: torch.dtype, place: Mapping[str, Any]) -> Any:
        config = QuantizeConfig(**self.options)
        planned = api.plan(self.base.folder, device="cpu", **self.options)
        headed, auto = self._headed(task, seed, dtype=dtype, **place)
        return attach_fresh(
            headed,
            [layer.info.module for layer in planned.layers],
            auto,
            rank=config.rank,
            alpha=config.rank if config.alpha is None else config.alpha,
            rslora=config.rslora,
        )

    def save(self, run: RunFolder, model: Any, tokenizer: Any) -> None:
        partial = run.adapter.with_name("adapter.partial")
        shutil.rmtree(partial, ignore_errors=True)
        model.save_pretrained(str(partial), selected_adapters=["default"])
        tokenizer.save_pretrained(str(partial))
        partial.rename(run.adapter)

    def sizes(self, model: nn.Module) -> dict[str, int]:
        trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
        frozen = sum(p.numel() for p in model.parameters() if not p.requires_grad)
        kept = WIDTH * frozen - _replaced(model)
        return {"backbone": 0, "kept": kept, "adapter": WIDTH * trained}


@dataclass(frozen=True, kw_only=True)
class FullStart(Start):
    """The original model, every weight trained in float32."""

    kind: ClassVar[str] = "full"

    def record(self) -> dict[str, str]:
        return {**super().record(), "baseline": self.kind}

    def load(self, task: Task, *, seed: int, dtype: torch.dtype, place: Mapping[str, Any]) -> Any:
        headed, _ = self._headed(task, seed, dtype=torch.float32, **place)
        return headed.model.requires_grad_(True)

    def save(self, run: RunFolder, model: Any, tokenizer: Any) -> None:
        partial = run.model.with_name("model.partial")
        shutil.rmtree(partial, ignore_errors=True)
        model.save_pretrained(str(partial))
        tokenizer.save_pretrained(str(partial))
        partial.rename(run.model)

    def sizes(self, model: nn.Module) -> dict[str, int]:
        weights = sum(p.numel() for p in model.parameters())
        return {"backbone": 0, "kept": WIDTH * weights, "adapter": 0}


def baseline(model: str, chosen: Chosen) -> Start:
    """The original model, to be fine-tuned without quantization.

    Raises:
        TaskError: the model is packed.
        ValueError: no such model.
    """
    folder = Path(model) if (Path(model) / "base.json").is_file() else resolve_source(model)
    if (folder / "loftq.json").is_file() or (folder / "base.json").is_file():
        raise TaskError(
            f"{model}: method={chosen.method} fine-tunes the original model, and this is a packed "
            "one. Give the full-precision model."
        )
    how = {"full": "the original model, every weight trained",
           "lora16": "the original model with a fresh LoRA"}[str(chosen.method)]  # fmt: skip
    base = Base(folder=folder, adapter=folder, backbone="", model=model, how=how)
    if chosen.method == "lora16":
        return LoraStart(base=base, options=chosen.quantize)
    return FullStart(base=base)


def _replaced(model: nn.Module) -> int:
    """Bytes of the untrained copies of the head that PEFT keeps beside the trained ones."""
    from peft.utils import ModulesToSaveWrapper

    wrapped = [m for m in model.modules() if isinstance(m, ModulesToSaveWrapper)]
    return sum(WIDTH * p.numel() for m in wrapped for p in m.original_module.parameters())
