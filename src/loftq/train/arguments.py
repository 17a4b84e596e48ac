"""Our settings in the words of transformers' TrainingArguments, which TRL's configs extend."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from loftq.train.config import Steps, TrainConfig
from loftq.train.errors import TrainError

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


def resolve_dtype(name: str, device: torch.device) -> str:
    """bf16, fp16 or fp32 for "auto" on this device.

    Raises:
        TrainError: a dtype that the device cannot train in.
    """
    cuda = device.type == "cuda"
    wide = torch.cuda.is_bf16_supported() if cuda else True
    if name == "auto":
        return ("bf16" if wide else "fp16") if cuda else "fp32"
    if name == "bf16" and not wide:
        raise TrainError("dtype=bf16: this GPU has none. Use dtype=fp16, or leave it to auto.")
    if name == "fp16" and not cuda:
        raise TrainError("dtype=fp16: needs a GPU. Use dtype=fp32 or bf16 on a CPU.")
    return name


def common_arguments(
    config: TrainConfig,
    steps: Steps,
    *,
    checkpoints: Path,
    dtype: str,
    device: torch.device,
    resumed: bool,
) -> dict[str, Any]:
    """Keyword arguments for SFTConfig and DPOConfig.

    Args:
        config: resolved for the kind of data.
        steps: of the run.
        checkpoints: folder for them.
        dtype: bf16, fp16 or fp32.
        device: where it trains.
        resumed: from a checkpoint: the score before the first step was taken then, and a second one
            would count against an early stop.
    """
    return {
        "output_dir": str(checkpoints),
        "max_steps": steps.total,
        "per_device_train_batch_size": config.batch_size,
        "per_device_eval_batch_size": config.batch_size,
        "gradient_accumulation_steps": config.gradient_accumulation,
        "learning_rate": config.learning_rate,
        "lr_scheduler_type": config.scheduler,
        "warmup_steps": steps.warmup,
        "weight_decay": config.weight_decay,
        "max_grad_norm": config.max_grad_norm,
        "optim": config.optimizer,
        "bf16": dtype == "bf16",
        "fp16": dtype == "fp16",
        "use_cpu": device.type == "cpu",
        "gradient_checkpointing": config.checkpointing,
        "gradient_checkpointing_kwargs": _kept(config) if config.checkpointing else None,
        "ddp_find_unused_parameters": False,
        "eval_strategy": "steps",
        "eval_steps": steps.evaluate,
        "eval_on_start": not resumed,
        "save_strategy": "steps",
        "save_steps": steps.save,
        "save_total_limit": config.keep_checkpoints,
        "load_best_model_at_end": True,
        "metric_for_best_model": "eval_loss",
        "greater_is_better": False,
        "restore_callback_states_from_checkpoint": True,  # the patience of an early stop
        "logging_steps": 1,
        "logging_nan_inf_filter": False,  # a loss that is not a number must be seen
        "report_to": config.report_to,
        "disable_tqdm": True,
        "seed": config.seed,
        "data_seed": config.seed,
    }


def _kept(config: TrainConfig) -> dict[str, Any]:
    """Of checkpointing. The state of random numbers cannot be read while a step is captured."""
    return {"use_reentrant": False, "preserve_rng_state": not config.graphs}
