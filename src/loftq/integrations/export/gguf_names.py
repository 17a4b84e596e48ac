"""What llama.cpp calls the tensors and settings of a transformers model, and how it turns q and k.

The names come from the `gguf` package; the settings are those that llama.cpp's loader of these
architectures asks for.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from loftq.checkpoint.export import ARCHITECTURES
from loftq.integrations.engines import OLDEST_WRITER, WRITER, in_range, version
from loftq.integrations.export.source import ExportError

if TYPE_CHECKING:
    from gguf import GGUFWriter

PERMUTED = {"llama": {"q_proj": "num_attention_heads", "k_proj": "num_key_value_heads"}}
"""Architecture -> projections whose rows llama.cpp stores in another order -> heads of them.

Its rotary embedding for `llama` turns neighbouring rows (2i, 2i + 1), that of transformers the rows
i and i + d/2 of a head.
"""
ROPE_KINDS = ("default", "linear", "yarn", "llama3")
SKIPPED = (".rotary_emb.inv_freq", ".attention.bias", ".attention.masked_bias")


def gguf_module() -> Any:
    """The `gguf` package.

    Raises:
        ModuleNotFoundError: not installed; names the extra that brings it.
        ExportError: installed, and older than we know to write with.
    """
    try:
        import gguf
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            "GGUF files are written with the package gguf: pip install 'loftq[demo]'", name="gguf"
        ) from error
    found = version(WRITER) or OLDEST_WRITER
    if not in_range(found, OLDEST_WRITER, None):
        raise ExportError(
            f"gguf {found} is installed, which is too old to write these files: pip install "
            f"'gguf>={OLDEST_WRITER}'"
        )
    return gguf


class GgufNames:
    """The translation for one model.

    Args:
        architecture: class that config.json names.
        config: config.json.

    Raises:
        ExportError: an architecture or setting that we do not translate.
    """

    def __init__(self, architecture: str, config: Mapping[str, Any]) -> None:
        gguf = gguf_module()
        self.config, self.arch = config, ARCHITECTURES[architecture]
        self._check()
        kind = {name: key for key, name in gguf.MODEL_ARCH_NAMES.items()}[self.arch]
        self._map = gguf.get_tensor_name_map(kind, config["num_hidden_layers"])

    def tensor(self, name: str) -> str | None:
        """GGUF's name of a tensor; None for one that the file does not need.

        Raises:
            ExportError: a tensor that llama.cpp has no place for.
        """
        if name.endswith(SKIPPED):
            return None
        if name == "lm_head.weight" and self.config.get("tie_word_embeddings"):
            return None
        found = self._map.get_name(name, try_suffixes=(".weight", ".bias"))
        if found is None:
            raise ExportError(
                f"{name}: llama.cpp's {self.arch} has no such tensor. Export with --to dense and "
                "use llama.cpp's own converter, which may know this model."
            )
        return str(found)

    def order(self, name: str, rows: int) -> Tensor | None:
        """Row of the source for each row of the GGUF tensor, or None where they are the same."""
        part = name.rpartition(".")[0].rpartition(".")[2]
        key = PERMUTED.get(self.arch, {}).get(part)
        if key is None:
            return None
        heads = int(self.config.get(key) or self.config["num_attention_heads"])
        return torch.arange(rows).view(heads, 2, -1).mT.flatten()

    def write_settings(self, writer: GGUFWriter) -> None:
        """The model's sizes and rotary embedding."""
        config = self.config
        heads = config["num_attention_heads"]
        head_dim = config.get("head_dim") or config["hidden_size"] // heads
        writer.add_block_count(config["num_hidden_layers"])
        writer.add_context_length(config["max_position_embeddings"])
        writer.add_embedding_length(config["hidden_size"])
        writer.add_feed_forward_length(config["intermediate_size"])
        writer.add_head_count(heads)
        writer.add_head_count_kv(config.get("num_key_value_heads") or heads)
        writer.add_key_length(head_dim)
        writer.add_value_length(head_dim)
        writer.add_rope_dimension_count(head_dim)
        writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
        writer.add_vocab_size(config["vocab_size"])
        rope = rope_settings(config)
        writer.add_rope_freq_base(rope["rope_theta"])
        if rope["rope_type"] in ("linear", "yarn"):
            gguf = gguf_module()
            writer.add_rope_scaling_type(gguf.RopeScalingType(rope["rope_type"]))
            writer.add_rope_scaling_factor(rope["factor"])
        if rope["rope_type"] == "yarn":
            original = rope.get("original_max_position_embeddings")
            writer.add_rope_scaling_orig_ctx_len(original or config["max_position_embeddings"])

    def extra_tensors(self) -> dict[str, Tensor]:
        """Tensors that the file has and the source has not: the frequencies of Llama 3."""
        rope = rope_settings(self.config)
        if rope["rope_type"] != "llama3":
            return {}
        heads = self.config["num_attention_heads"]
        dim = self.config.get("head_dim") or self.config["hidden_size"] // heads
        return {"rope_freqs.weight": llama3_factors(rope, dim)}

    def _check(self) -> None:
        config, rope = self.config, rope_settings(self.config)
        problem = ""
        if config.get("hidden_act", "silu") != "silu":
            problem = f"hidden_act={config['hidden_act']!r}, expected 'silu'"
        elif rope["rope_type"] not in ROPE_KINDS:
            problem = f"rope_type={rope['rope_type']!r}, expected one of {', '.join(ROPE_KINDS)}"
        elif config.get("use_sliding_window"):
            problem = "sliding-window attention"
        elif config.get("num_local_experts") or config.get("num_experts"):
            problem = "experts"
        if problem:
            raise ExportError(
                f"config.json: {problem}; this export does not translate it for llama.cpp. Export "
                "with --to dense and use llama.cpp's own converter."
            )


def rope_settings(config: Mapping[str, Any]) -> dict[str, Any]:
    """rope_type, rope_theta and the rest, from the keys of transformers 5 or earlier."""
    found = dict(config.get("rope_scaling") or {}) | dict(config.get("rope_parameters") or {})
    found.setdefault("rope_type", found.get("type") or "default")
    found.setdefault("rope_theta", config.get("rope_theta") or 10000.0)
    return found


def llama3_factors(rope: Mapping[str, Any], dim: int) -> Tensor:
    """By what each rotary frequency is divided, float32 (dim / 2,), as transformers' "llama3".

    Wavelengths above context / low_freq_factor are stretched by `factor`, those below context /
    high_freq_factor not at all, and in between it goes over smoothly.
    """
    low, high = rope["low_freq_factor"], rope["high_freq_factor"]
    context, factor = rope["original_max_position_embeddings"], rope["factor"]
    exponents = torch.arange(0, dim, 2, dtype=torch.float64) / dim
    wavelength = 2 * math.pi * rope["rope_theta"] ** exponents
    smooth = ((context / wavelength - low) / (high - low)).clamp(0, 1)
    return (1 / ((1 - smooth) / factor + smooth)).float()
