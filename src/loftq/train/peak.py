"""The most memory that a run takes: what torch allocates on a GPU, anonymous memory on a CPU."""

from __future__ import annotations

import threading
from pathlib import Path

import torch

STATUS = Path("/proc/self/status")
INTERVAL = 0.02  # seconds between two looks


class PeakMeter:
    """Bytes of memory at the peak, above what was in use when the meter was made.

    On a GPU torch's max_memory_allocated, which leaves out the CUDA context. On a CPU the anonymous
    resident memory (RssAnon: heap, not files), looked at every 20 ms by a thread, above what Python
    and its libraries had taken before. Where the system does not say it, there is no figure.

    Args:
        device: of the training.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._base = 0 if device.type == "cuda" else anonymous_bytes()
        self._peak: int | None = None
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None

    def start(self) -> None:
        """Forget earlier peaks and look from now on."""
        if self._device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self._device)
        elif self._base is not None:
            self._peak, self._stop = 0, threading.Event()
            self._thread = threading.Thread(target=self._watch, daemon=True)
            self._thread.start()

    def stop(self) -> None:
        """Look no more; the peak stays readable."""
        self._stop.set()
        if self._thread is not None:
            self._thread.join()
            self._thread = None

    @property
    def peak(self) -> int | None:
        """Bytes since `start`, or None if it cannot be told here."""
        if self._device.type == "cuda":
            return torch.cuda.max_memory_allocated(self._device)
        if self._thread is not None:
            self._look()
        return self._peak

    def _watch(self) -> None:
        while not self._stop.wait(INTERVAL):
            self._look()

    def _look(self) -> None:
        now = anonymous_bytes()
        if now is not None and self._base is not None:
            self._peak = max(self._peak or 0, now - self._base)


def anonymous_bytes() -> int | None:
    """Anonymous resident memory of this process, or None where there is no such figure."""
    try:
        text = STATUS.read_text(encoding="ascii", errors="replace")
    except OSError:
        return None
    lines = [line for line in text.splitlines() if line.startswith("RssAnon:")]
    return int(lines[0].split()[1]) * 1024 if lines else None


def capacity(device: torch.device) -> int | None:
    """Bytes of memory that a GPU or this machine has."""
    if device.type == "cuda":
        return int(torch.cuda.get_device_properties(device).total_memory)
    try:
        text = Path("/proc/meminfo").read_text(encoding="ascii")
    except OSError:
        return None
    return int(text.split("MemTotal:")[1].split()[0]) * 1024
