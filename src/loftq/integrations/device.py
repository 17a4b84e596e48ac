"""Where a model runs, checked before anything is loaded."""

from __future__ import annotations

import torch


def default_device() -> str:
    """The GPU if torch can use one."""
    return "cuda" if torch.cuda.is_available() else "cpu"


def check_device(device: str) -> None:
    """Refuse a device that torch does not know or cannot use here, before anything is written."""
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(
            f"device={device!r}: torch cannot use it here ({reason}). Choose cpu, or see what "
            "`loftq doctor` finds."
        ) from error


def check_bfloat16(dtype: torch.dtype, device: torch.device) -> None:
    """Refuse bfloat16 on a GPU that would only emulate it."""
    if dtype != torch.bfloat16 or device.type != "cuda":
        return
    if not torch.cuda.is_bf16_supported(including_emulation=False):
        raise ValueError(
            f"{torch.cuda.get_device_name(device)} has no bfloat16, in which this model is stored. "
            "Add dtype=float16, or dtype=float32 for twice the memory."
        )
