"""The files beside the weights: config.json, the adapter's config, loftq.json, the model card."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from loftq import __version__
from loftq.integrations.card import CARD, origin_of, output_card
from loftq.pipeline.layout import SHARES
from loftq.pipeline.plan import Plan
from loftq.pipeline.run import RunResult

QUANT_VERSION = 1
WEIGHTS_INDEX = "loftq.safetensors.index.json"
# What a tokenizer or processor needs; weights, code and the source's own card stay behind.
COMPANIONS = ("*.json", "*.txt", "*.model", "*.jinja", "*.tiktoken", "*.vocab", "*.bpe")
NOT_COMPANIONS = (
    "config.json",
    "*.index.json",
    "loftq.json",
    "timings.json",
    "hub.json",
    "SOURCE.json",
)


def extra_files(result: RunResult, folder: Path, source_name: str, output: str) -> dict[str, bytes]:
    """Everything but the weights, config.json last: a folder without it is unfinished."""
    files = {path.name: path.read_bytes() for path in companions(folder)}
    files["init_adapter/adapter_config.json"] = _json(adapter_config(result.plan, output))
    files["init_adapter/loftq_lineage.json"] = _json({"version": 1, "backbone": result.backbone})
    record = provenance(result, source_name)
    files["loftq.json"] = _json(record)
    files["timings.json"] = _json(dict(result.timings))
    card = output_card(record, origin_of(source_name, folder), name=Path(output).name)
    files[CARD] = card.encode()
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    config["quantization_config"] = quantization_config(result)
    files["config.json"] = _json(config)
    return files


def companions(folder: Path) -> list[Path]:
    """Tokenizer, processor and generation files of the source, sorted by name."""
    found = {path for pattern in COMPANIONS for path in folder.glob(pattern) if path.is_file()}
    return sorted(p for p in found if not any(p.match(pattern) for pattern in NOT_COMPANIONS))


def quantization_config(result: RunResult) -> dict[str, Any]:
    """What transformers needs to rebuild the packed modules."""
    plan = result.plan
    return {
        "quant_method": "loftq",
        "version": QUANT_VERSION,
        "weights": WEIGHTS_INDEX,
        "layers": layer_entries(plan, result.formats),
        "modules_to_not_convert": dense_modules(plan),
        "backbone": result.backbone,
        "adapter_required": plan.config.resolved_method().adapter_required,
    }


def dense_modules(plan: Plan) -> list[str]:
    """Linear-like modules that stay dense; a head that shares the packed embedding is none."""
    return sorted(kept.module for kept in plan.layout.kept if kept.reason != SHARES)


def layer_entries(plan: Plan, formats: Mapping[str, str]) -> dict[str, dict[str, Any]]:
    """Format, as it was stored, and shape of each packed module."""
    return {
        layer.info.module: {
            "format": formats[layer.info.module], "shape": list(layer.info.shape),
        }
        for layer in plan.layers
    }  # fmt: skip


def adapter_config(plan: Plan, base: str) -> dict[str, Any]:
    """PEFT's adapter_config.json for the start adapter."""
    config = plan.config
    return {
        "peft_type": "LORA",
        "task_type": plan.layout.task_type,
        "base_model_name_or_path": base,
        "r": config.rank,
        "lora_alpha": config.rank if config.alpha is None else config.alpha,
        "use_rslora": config.rslora,
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": any(layer.info.kind == "conv1d" for layer in plan.layers),
        "init_lora_weights": True,
        "inference_mode": True,
        "target_modules": target_modules(plan),
        **_patterns(plan),
    }


def _patterns(plan: Plan) -> dict[str, dict[str, float]]:
    """PEFT's ranks and alphas of the layers whose rank is another; s is that of all layers."""
    config = plan.config
    ranks = {x.info.module: x.rank for x in plan.layers if x.rank not in (0, config.rank)}
    if not ranks:
        return {}
    root = 0.5 if config.rslora else 1.0
    alphas = {module: config.scaling * rank**root for module, rank in ranks.items()}
    return {"rank_pattern": dict(ranks), "alpha_pattern": alphas}


def target_modules(plan: Plan) -> list[str]:
    """Short names where they select exactly the quantized layers, whole paths otherwise."""
    chosen = {layer.info.module for layer in plan.layers if layer.rank}
    suffixes = sorted({module.rsplit(".", 1)[-1] for module in chosen})
    others = {kept.module for kept in plan.layout.kept}
    others |= {layer.info.module for layer in plan.layers if not layer.rank}
    if any(other.rsplit(".", 1)[-1] in suffixes for other in others):
        return sorted(chosen)
    return suffixes


def provenance(result: RunResult, source_name: str) -> dict[str, Any]:
    """loftq.json: resolved config, versions, source, a hash per tensor, a record per layer."""
    import torch

    plan = result.plan
    return {
        "version": 1,
        "loftq": __version__,
        "torch": torch.__version__,
        "device": plan.device,
        "source": {"name": source_name, "fingerprint": plan.source_fingerprint},
        "config": plan.config.to_dict(),
        "scaling": plan.config.scaling,
        "calibration": calibration_record(plan),
        "allocation": allocation_record(plan),
        "refinement": [dict(stage) for stage in result.refinement] or None,
        "totals": totals(result),
        "backbone": result.backbone,
        "kept": [
            {"module": k.module, "parameters": k.parameters, "reason": k.reason}
            for k in plan.layout.kept
        ],
        "layers": [
            {**record, "tensor": layer.info.tensor, "kind": layer.info.kind,
             "shape": list(layer.info.shape)}
            for record, layer in zip(result.records, plan.layers, strict=True)
        ],
        "tensors": dict(result.hashes),
    }  # fmt: skip


def calibration_record(plan: Plan) -> dict[str, Any] | None:
    """What the statistics were taken on; where they were kept meanwhile is nobody's business."""
    if plan.calibration is None:
        return None
    return {key: value for key, value in plan.calibration.to_dict().items() if key != "folder"}


def allocation_record(plan: Plan) -> dict[str, Any] | None:
    """Budget, cost and rivals of a measured allocation; the layers' records hold the rest."""
    if plan.choice is None:
        return None
    told = plan.choice.to_dict()
    return {key: value for key, value in told.items() if key not in ("formats", "ranks")}


def totals(result: RunResult) -> dict[str, Any]:
    """Bytes, bits and the error over all quantized weights."""
    plan = result.plan
    return {
        "quantized_weights": plan.weights,
        "bits_per_weight": plan.bits_per_weight,
        "packed_bytes": plan.packed_bytes,
        "unquantized_bytes": plan.copied_bytes,
        "adapter_bytes": plan.adapter_bytes,
        "source_bytes": plan.source_bytes,
        "mean_plain_error": _mean(result.records, "plain_error"),
        "mean_error": _mean(result.records, "error"),
    }


def _mean(records: tuple[Mapping[str, Any], ...], key: str) -> float:
    return sum(record[key] for record in records) / len(records)


def _json(value: Mapping[str, Any]) -> bytes:
    return (json.dumps(value, indent=2, ensure_ascii=False) + "\n").encode()
