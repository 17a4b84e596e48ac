"""A PEFT LoRA folder as tensors and numbers, and its way into other folders."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from loftq.checkpoint import Checkpoint, open_checkpoint
from loftq.integrations.peft import scaling_of
from loftq.pipeline.plan import ADAPTER_PREFIX

CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"
PARTS = {
    ".lora_A.weight": "A",
    ".lora_B.weight": "B",
    ".lora_embedding_A": "A",
    ".lora_embedding_B": "B",
}
PATTERNS = {"rank_pattern": "several ranks", "alpha_pattern": "several alphas"}
"""Keys of adapter_config.json that give a layer a rank or alpha of its own."""
UNSUPPORTED = {
    "use_dora": "DoRA",
    "target_parameters": "parameters as targets",
    "trainable_token_indices": "trained tokens",
}
"""Keys of adapter_config.json that make the update something else than one s B A per layer."""


@dataclass(frozen=True)
class LoraAdapter:
    """An adapter folder; opening it reads JSON and headers."""

    folder: Path
    config: Mapping[str, Any]
    tensors: Checkpoint

    @classmethod
    def open(cls, folder: Path) -> LoraAdapter:
        """Open the folder.

        Raises:
            ValueError: no adapter there, or not a LoRA stored as safetensors.
        """
        try:
            config = json.loads((folder / CONFIG).read_bytes())
        except (OSError, ValueError) as error:
            raise ValueError(f"{folder}: no readable {CONFIG} ({error}).") from error
        if config.get("peft_type") != "LORA":
            raise ValueError(
                f"{folder}: a {config.get('peft_type')} adapter. Only LoRA can be exported."
            )
        return cls(folder, config, open_checkpoint(folder, weights=WEIGHTS))

    @property
    def rank(self) -> int:
        """r."""
        return int(self.config["r"])

    @property
    def scaling(self) -> float:
        """The factor before B A: alpha / r, or alpha / sqrt(r) for rsLoRA."""
        alpha = float(self.config["lora_alpha"])
        return alpha / (math.sqrt(self.rank) if self.config.get("use_rslora") else self.rank)

    def update(self, module: str) -> Tensor | None:
        """s B A of a layer, float32, with its own rank and alpha; None where it has no factors."""
        pair = self.pairs.get(module)
        if pair is None:
            return None
        A, B = self.read(pair["A"]).float(), self.read(pair["B"]).float()
        return scaling_of(self.config, module) * (B @ A)

    @property
    def pairs(self) -> dict[str, dict[str, str]]:
        """Module -> {"A": tensor name, "B": tensor name}."""
        found: dict[str, dict[str, str]] = {}
        for name in self.tensors.tensors:
            ending = next((e for e in PARTS if name.endswith(e)), None)
            if ending is not None:
                module = name.removeprefix(ADAPTER_PREFIX).removesuffix(ending)
                found.setdefault(module, {})[PARTS[ending]] = name
        return found

    @property
    def whole(self) -> dict[str, str]:
        """Model tensor -> adapter tensor that replaces it (modules_to_save, a trained head).

        PEFT saves an adapted embedding with its frozen base, which is the backbone's and no change.
        """
        factors = {name for pair in self.pairs.values() for name in pair.values()}
        return {
            name.removeprefix(ADAPTER_PREFIX): name
            for name in self.tensors.tensors
            if name not in factors and ".base_layer." not in name
        }

    def read(self, name: str) -> Tensor:
        """One tensor."""
        return self.tensors.read(name)

    def sha256(self) -> str:
        """Of config and weights."""
        digest = hashlib.sha256((self.folder / CONFIG).read_bytes())
        for name in sorted(self.tensors.tensors):
            digest.update(f"{name} {self.tensors.sha256(name)}\n".encode())
        return digest.hexdigest()

    @property
    def highest_rank(self) -> int:
        """The most that any layer has."""
        return max(self.rank, *(self.config.get("rank_pattern") or {}).values(), 0)

    def plain(self, *, patterns: bool = False) -> None:
        """Check that the update of every layer is s B A and nothing else.

        Args:
            patterns: ranks and alphas may differ from layer to layer.

        Raises:
            ValueError: naming what else there is.
        """
        refused = UNSUPPORTED if patterns else {**PATTERNS, **UNSUPPORTED}
        extras = [what for key, what in refused.items() if self.config.get(key)]
        if self.config.get("bias", "none") != "none":
            extras.append("trained biases")
        if extras:
            merge = "" if set(extras) - set(PATTERNS.values()) else ", merge it with --to dense"
            raise ValueError(
                f"{self.folder / CONFIG}: {', '.join(extras)}. This export computes with B A and "
                f"one scaling alone; serve the packed model in transformers{merge}, or train "
                "without."
            )

    def config_for(self, base: str) -> dict[str, Any]:
        """adapter_config.json for the same factors on a base of another name."""
        alpha = float(self.config["lora_alpha"])
        return {
            **self.config,
            "base_model_name_or_path": base,
            "inference_mode": True,
            # vLLM declares an integer
            "lora_alpha": int(alpha) if alpha.is_integer() else alpha,
        }
