"""What transformers does not check when it fills packed layers, checked before and after."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from loftq.formats import COMPONENTS, FormatSpec, component_shapes
from loftq.nn import PackedLayer
from loftq.ops.reference import PER_TENSOR, SCALE_DTYPES, view_bytes

SUFFIXES = tuple(f".{name}" for name in COMPONENTS)


class LoadError(ValueError):
    """A packed model whose files are incomplete or damaged."""


def check_files(files: Iterable[str], layers: int) -> None:
    """Headers: every packed tensor is uint8 and there are as many as the config lists.

    transformers casts a tensor of another dtype to bytes without a word, and a packed tensor that
    the config does not list would leave a randomly initialised layer.

    Args:
        files: the resolved safetensors files.
        layers: packed layers in quantization_config.

    Raises:
        LoadError: naming the tensor and the file.
    """
    from safetensors import safe_open

    found = 0
    for file in files:
        with safe_open(file, framework="pt") as reader:
            packed = [key for key in reader.keys() if key.endswith(SUFFIXES)]  # noqa: SIM118
            for key in packed:
                dtype = reader.get_slice(key).get_dtype()
                if dtype != "U8":
                    raise LoadError(
                        f"{key} in {file}: found dtype {dtype}, expected U8. The file was "
                        "rewritten by a tool that cast packed bytes; quantize again or restore it."
                    )
            found += sum(key.endswith(".weight_packed") for key in packed)
    if found != layers:
        raise LoadError(
            f"quantization_config lists {layers} packed layers, the weight files hold {found}. "
            "config.json and the weights come from different runs; restore the pair."
        )


def check_loaded(layers: Mapping[str, PackedLayer]) -> None:
    """Every packed tensor arrived, in shape, as bytes, with finite scales.

    Raises:
        LoadError: naming the tensor.
    """
    finite: dict[str, Tensor] = {}
    for path, layer in layers.items():
        shapes = component_shapes(layer.spec, layer.packed_shape)
        with _materialized(layer) as offloaded:
            _check_presence(path, layer, offloaded)
            for name, shape in shapes.items():
                tensor = layer._parameters[name]
                assert tensor is not None
                _check_tensor(f"{path}.{name}", layer, name, tensor, shape)
            if _has_values():
                finite |= _finite(path, layer)
    broken = [name for name, flag in finite.items() if not bool(flag)]
    if broken:
        raise LoadError(
            f"{broken[0]}: not finite ({len(broken)} such tensors). The file is damaged: "
            "`loftq inspect --check` compares every hash; download or quantize again."
        )


def _check_presence(path: str, layer: PackedLayer, offloaded: bool) -> None:
    for name, parameter in layer.named_parameters(recurse=False):
        # The loader marks what it sets. What it did not find it leaves as uninitialised memory.
        if not offloaded and not getattr(parameter, "_is_hf_initialized", False):
            raise LoadError(
                f"{path}.{name}: missing in the weight files. The model would compute with "
                "uninitialised memory; download or quantize again."
            )


def _check_tensor(
    label: str, layer: PackedLayer, name: str, tensor: Tensor, shape: tuple[int, ...]
) -> None:
    if tuple(tensor.shape) != shape:
        raise LoadError(
            f"{label}: found shape {tuple(tensor.shape)}, expected {shape} for {layer.spec} of "
            f"{layer.packed_shape}. config.json and the weights disagree; restore the pair."
        )
    if tensor.dtype != torch.uint8:
        # transformers 5.17 applies "keep in float32" to every tensor of a module; 0..255 survive.
        # Other dtypes were refused by `check_files`.
        layer._parameters[name] = nn.Parameter(tensor.to(torch.uint8), requires_grad=False)


def _finite(path: str, layer: PackedLayer) -> dict[str, Tensor]:
    spec: FormatSpec = layer.spec
    numbers = {"weight_nested": torch.float32}
    if spec.scale_coding != "dq":
        numbers = {"weight_scale": SCALE_DTYPES[spec.scale_coding]}
    if spec.group_size == PER_TENSOR:
        numbers["weight_zero"] = torch.float32
    found = {name: layer._parameters[name] for name in numbers}
    return {
        f"{path}.{name}": torch.isfinite(view_bytes(tensor.detach(), numbers[name])).all()
        for name, tensor in found.items()
        if tensor is not None and not tensor.is_meta
    }


def _has_values() -> bool:
    """Whether this process read the files (under FSDP's RAM-efficient loading only rank 0 did)."""
    from transformers.modeling_utils import is_fsdp_enabled, is_local_dist_rank_0

    return not is_fsdp_enabled() or bool(is_local_dist_rank_0())


class _materialized:
    """The layer with its offloaded tensors in memory; yields whether there were any."""

    def __init__(self, layer: PackedLayer) -> None:
        self._offloaded = hasattr(layer, "_hf_hook") and layer.weight_packed.is_meta
        self._context: Any = nullcontext()
        if self._offloaded:
            from accelerate.utils import align_module_device  # type: ignore[import-untyped]

            self._context = align_module_device(layer, execution_device=torch.device("cpu"))

    def __enter__(self) -> bool:
        self._context.__enter__()
        return self._offloaded

    def __exit__(self, *error: Any) -> None:
        self._context.__exit__(*error)


def spans_devices(device_map: Any) -> bool:
    """Whether a device_map may put one model on several devices."""
    if isinstance(device_map, str):
        return device_map in ("auto", "balanced", "balanced_low_0", "sequential")
    return isinstance(device_map, dict) and len(set(map(str, device_map.values()))) > 1


def world_size() -> int:
    """Processes of the launcher."""
    return int(os.environ.get("WORLD_SIZE", "1") or 1)
