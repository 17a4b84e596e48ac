"""Give a packed model's adapters the one-step correction, layer by layer, as a metric allows.

For a base whose Q is plainly rounded (`qlora`), B A = svd_r(W - Q) is LoftQ's T = 1. It lowers the
weight error of every layer, yet not always what the user measures: each layer's correction is put
in, the metric is asked, and a layer that does not help is rolled back. Greedy, so the order of the
layers matters; a second pass may accept what the first refused.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import nn

from loftq.checkpoint import open_checkpoint
from loftq.integrations.conv1d import QuantConv1D
from loftq.integrations.discover import describe_folder, resolve_source
from loftq.lowrank import best_correction
from loftq.nn import PackedLayer, QuantLinear
from loftq.pipeline.stream import oriented

if TYPE_CHECKING:
    from peft import PeftModel


def greedy_adapter(
    model: PeftModel,
    source: str | Path,
    accept: Callable[[PeftModel, str], bool],
    *,
    adapter: str = "default",
) -> dict[str, bool]:
    """Correct the adapters of a packed PEFT model one layer at a time.

    Args:
        model: packed base with LoRA adapters, for example from `loftq.load(OUT, trainable=True)`.
        source: the original model's folder or hub id; weights are read from it one by one.
        accept: called as accept(model, module path) with the layer's correction in place; False
            rolls that layer back to what it was.
        adapter: name of the adapter to change.

    Returns:
        Module path -> whether its correction was kept.

    Raises:
        ValueError: the model has no packed layer with an adapter, or a source weight is missing.
    """
    folder = resolve_source(source)
    checkpoint = open_checkpoint(folder)
    base = model.get_base_model()
    layers = _adapted(base, adapter)
    if not layers:
        raise ValueError(
            f"adapter {adapter!r}: no packed linear layer carries it. Load with "
            "loftq.load(OUT, trainable=True), or name the adapter."
        )
    shapes = {name: entry.shape for name, entry in checkpoint.tensors.items()}
    infos = {info.module: info for info in describe_folder(folder, shapes).layers}
    missing = sorted(set(layers) - set(infos))
    if missing:
        raise ValueError(f"{missing[0]}: {folder} has no such layer; is it the model's source?")
    kept = {}
    for path, layer in layers.items():
        A = layer.get_parameter(f"lora_A.{adapter}.weight")
        B = layer.get_parameter(f"lora_B.{adapter}.weight")
        before = A.detach().clone(), B.detach().clone()
        W = oriented(checkpoint.read(infos[path].tensor).to(A.device).float(), infos[path])
        packed = layer.base_layer
        assert isinstance(packed, PackedLayer)
        root = math.sqrt(layer.scaling[adapter])  # type: ignore[index]
        step = best_correction(W - packed.quantized().dequantize(), A.shape[0])
        with torch.no_grad():
            A.copy_(step.A / root)
            B.copy_(step.B / root)
        kept[path] = bool(accept(model, path))
        if not kept[path]:
            with torch.no_grad():
                A.copy_(before[0])
                B.copy_(before[1])
    return kept


def _adapted(base: nn.Module, adapter: str) -> dict[str, nn.Module]:
    return {
        path: module
        for path, module in base.named_modules()
        if isinstance(getattr(module, "base_layer", None), QuantLinear | QuantConv1D)
        and adapter in getattr(module, "lora_A", {})
    }
