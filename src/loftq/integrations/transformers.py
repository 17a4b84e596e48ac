"""from_pretrained and save_pretrained of packed models: the quantizer transformers calls.

Only hooks that both ends of the supported range have are overridden, plus one of each end to name
the weight file. The packed tensors are ordinary parameters of the swapped layers, so transformers'
own loader fills them by name.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers.quantizers import (
    HfQuantizer,
    register_quantization_config,
    register_quantizer,
)

from loftq.integrations.builders import BUILDERS
from loftq.integrations.config import METHOD, LoftqConfig
from loftq.integrations.guard import guard_adapter
from loftq.integrations.loading import check_files, check_loaded, spans_devices, world_size
from loftq.integrations.tied import share_packed_
from loftq.nn import dequantize_model_, packed_layers, replace_layer

if TYPE_CHECKING:
    # At run time this module may be imported from inside transformers.modeling_utils (see _hook).
    from transformers import PretrainedConfig, PreTrainedModel


class LoftqHfQuantizer(HfQuantizer):
    """Swaps packed layers in before the weights are read, and checks them after."""

    requires_calibration = False  # transformers' own refusal does not say what to do
    quantization_config: LoftqConfig

    def __init__(self, quantization_config: LoftqConfig, **kwargs: Any) -> None:
        super().__init__(quantization_config, **kwargs)
        if not self.pre_quantized:
            raise ValueError(
                "from_pretrained cannot quantize with LoftqConfig. Quantize once with "
                "`loftq quantize MODEL -o OUT` (loftq.quantize) and load OUT, or quantize a loaded "
                "model in memory with loftq.quantize_model(model)."
            )

    @property
    def is_trainable(self) -> bool:
        return True

    @property
    def is_compileable(self) -> bool:
        return True

    def is_serializable(self) -> bool:
        return True

    def validate_environment(self, *args: Any, device_map: Any = None, **kwargs: Any) -> None:
        """Refuse to spread each process' model over all devices under a launcher."""
        if world_size() > 1 and spans_devices(device_map):
            raise ValueError(
                f"device_map={device_map!r} under {world_size()} processes would put every "
                "process' model on the same devices. Use device_map={'': local_rank}."
            )

    def update_attn_implementation(self, config: PretrainedConfig) -> PretrainedConfig:
        """Name the weight file (transformers >= 5.18; the hook runs before files are resolved)."""
        if self.quantization_config.weights is not None:
            config.transformers_weights = self.quantization_config.weights
        return config

    update_tp_plan = update_attn_implementation  # transformers 5.17, for the same purpose

    def update_ep_plan(self, config: PretrainedConfig) -> PretrainedConfig:
        return config

    def update_parallel_plan(self, model: PreTrainedModel, plan: dict[str, str]) -> None:
        """Nothing: tensor parallelism is refused before this."""

    def _process_model_before_weight_loading(
        self, model: PreTrainedModel, checkpoint_files: list[str] | None = None, **kwargs: Any
    ) -> None:
        _refuse_tensor_parallel(model.config)
        config = self.quantization_config
        files = checkpoint_files or []
        if files and all(file.endswith(".safetensors") for file in files):
            check_files(files, len(config.layers))
        paths = _paths_in(model, config)
        with torch.device("meta"):
            for path, listed in paths.items():
                layer = replace_layer(
                    model, path, config.spec(listed), shape=config.shape(listed), builders=BUILDERS
                )
                layer.compute_dtype = _planned_dtype(model, path, layer.compute_dtype)
            share_packed_(model)
        # From here on the config speaks of this model: the paths that it has.
        config.layers = {path: config.layers[listed] for path, listed in paths.items()}
        ignored = model._keys_to_ignore_on_load_unexpected
        model._keys_to_ignore_on_load_unexpected = {*(ignored or ()), _guard_pattern(paths)}

    def _process_model_after_weight_loading(self, model: PreTrainedModel, **kwargs: Any) -> None:
        layers = packed_layers(model)
        check_loaded(layers)
        for layer in layers.values():
            layer.requires_grad_(False)  # the loader makes every bias trainable
        if self.quantization_config.adapter_required:
            guard_adapter(model)

    def _dequantize(
        self, model: PreTrainedModel, dtype: torch.dtype | None = None
    ) -> PreTrainedModel:
        dequantize_model_(model, dtype)
        return model

    def get_state_dict_and_metadata(
        self, model: PreTrainedModel
    ) -> tuple[dict[str, Tensor] | None, dict[str, str]]:
        """Before a save: the config says what is packed now, and the guard is put in.

        save_pretrained chooses the file name, so the guard of OUT (an unusual name) is lost. One
        tensor `<layer>.weight` of shape (1,) replaces it: transformers without loftq finds a shape
        mismatch there and stops, and we ignore it.
        """
        config = self.quantization_config
        packed = packed_layers(model)
        if not packed:
            self.remove_quantization_config(model)
            return None, {}
        merged = set(config.layers) - {_bare(path) for path in packed}
        if merged:
            config.layers = {k: v for k, v in config.layers.items() if k not in merged}
            config.modules_to_not_convert = sorted({*config.modules_to_not_convert, *merged})
            config.backbone = None
        config.weights = None
        state = model.state_dict()
        if not getattr(model, "_hf_peft_config_loaded", False):  # else only the adapter is saved
            state[f"{next(iter(packed))}.weight"] = torch.zeros(1)
        return state, {}


def register() -> None:
    """Make transformers know the config and the quantizer; calling it again does nothing."""
    from transformers.quantizers.auto import (
        AUTO_QUANTIZATION_CONFIG_MAPPING,
        AUTO_QUANTIZER_MAPPING,
    )

    if METHOD not in AUTO_QUANTIZATION_CONFIG_MAPPING:
        register_quantization_config(METHOD)(LoftqConfig)
    if METHOD not in AUTO_QUANTIZER_MAPPING:
        register_quantizer(METHOD)(LoftqHfQuantizer)


def attach(model: PreTrainedModel, config: LoftqConfig) -> None:
    """Make a model whose layers were packed in memory one that from_pretrained would return."""
    from transformers import PreTrainedModel

    model.hf_quantizer = LoftqHfQuantizer(config, pre_quantized=True)
    model.config.quantization_config = config
    model.is_quantized = True
    model.quantization_method = METHOD
    for module in model.modules():
        if isinstance(module, PreTrainedModel):
            module.config._is_quantized = True
    if config.adapter_required:
        guard_adapter(model)


def _paths_in(model: PreTrainedModel, config: LoftqConfig) -> dict[str, str]:
    """Path in this model -> path in the config, which may be that of a class with another head."""
    modules = dict(model.named_modules())
    prefix = f"{model.base_model_prefix}." if model.base_model_prefix else ""
    found = {}
    for listed in config.layers:
        candidates = (listed, listed.removeprefix(prefix), prefix + listed)
        path = next((c for c in candidates if c in modules), None)
        if path is not None:
            found[path] = listed
    if config.layers and not found:
        raise ValueError(
            f"{type(model).__name__} has none of the {len(config.layers)} packed modules, such as "
            f"{next(iter(config.layers))}. Load the architecture the model was quantized as "
            f"({', '.join(model.config.architectures or ['?'])})."
        )
    return found


def _planned_dtype(model: PreTrainedModel, path: str, dtype: torch.dtype) -> torch.dtype:
    """Modules that transformers keeps in float32 compute in it, packed or not."""
    for pattern, planned in model._get_dtype_plan(dtype).items():
        if re.search(pattern.replace(".", r"\.").replace("*", ".*"), path):
            return planned
    return dtype


def _guard_pattern(paths: dict[str, str]) -> str:
    names = "|".join(re.escape(path) for path in (*paths, *paths.values()))
    return rf"^({names})\.weight$"


def _bare(path: str) -> str:
    """Path of a packed layer without the wrappers that PEFT puts around it."""
    return path.removesuffix(".base_layer").removeprefix("base_model.model.")


def _refuse_tensor_parallel(config: PretrainedConfig) -> None:
    size = getattr(getattr(config, "distributed_config", None), "tp_size", None) or 1
    if size > 1:
        raise ValueError(
            f"tp_size={size}: packed layers cannot be split by tensor parallelism. Load without "
            "tp_plan; train with DDP or FSDP2 (torchrun, accelerate), serve an export instead."
        )


register()
