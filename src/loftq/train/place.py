"""The device of a run, and the processes of its launcher."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from datetime import timedelta
from typing import Any

import torch

from loftq.integrations.device import check_device, default_device
from loftq.integrations.loading import world_size
from loftq.train.errors import TrainError

PATIENCE = timedelta(days=1)
"""Of processes that wait for the main one, which may have to quantize the model first."""


class Place:
    """Where a run happens: one device per process.

    Args:
        device: "cpu" or "cuda"; None = the GPU if there is one.

    Raises:
        TrainError: a numbered device, which the launcher or CUDA_VISIBLE_DEVICES chooses.
        ValueError: a device that torch cannot use here.
    """

    def __init__(self, device: str | None) -> None:
        kind = device or default_device()
        if kind not in ("cpu", "cuda"):
            raise TrainError(
                f"device={kind}: give cpu or cuda. Which GPU it is says the environment: "
                "CUDA_VISIBLE_DEVICES=1 for the second one."
            )
        check_device(kind)
        from accelerate import PartialState  # type: ignore[import-untyped]

        self._state = None
        if world_size() > 1:
            self._state = PartialState(cpu=kind == "cpu", timeout=PATIENCE)
        index = int(os.environ.get("LOCAL_RANK", "0"))
        self.device = torch.device("cpu") if kind == "cpu" else torch.device("cuda", index)
        self.processes = world_size()

    @property
    def is_main(self) -> bool:
        """Whether this process writes and speaks."""
        return self._state is None or bool(self._state.is_main_process)

    def wait(self) -> None:
        """Until every process is here."""
        if self._state is not None:
            self._state.wait_for_everyone()

    @contextlib.contextmanager
    def main_first(self) -> Iterator[None]:
        """The main process goes before the others, which find what it made."""
        if not self.is_main:
            self.wait()
        yield
        if self.is_main:
            self.wait()

    def loading(self) -> dict[str, Any]:
        """Options of from_pretrained: straight to the device, without a copy in host memory."""
        return {} if self.device.type == "cpu" else {"device_map": {"": self.device.index}}

    def note(self) -> str:
        """What there is to say about devices, or ""."""
        idle = torch.cuda.device_count() - 1 if self.device.type == "cuda" else 0
        if idle < 1 or self.processes > 1:
            return ""
        return (
            f"{idle + 1} GPUs are here and this run uses one; "
            f"`torchrun --nproc-per-node {idle + 1} -m loftq train ...` uses all"
        )
