"""Where numbers come from: device, versions, commit, date."""

from __future__ import annotations

import datetime
import platform
import subprocess
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

PACKAGES = ("torch", "transformers", "peft")
HERE = Path(__file__).resolve().parent


def describe_machine(device: str) -> dict[str, str]:
    """Facts that a row carries; `device` as the run names it (cpu, cuda, cuda:0)."""
    return {
        "device": device_name(device),
        "python": platform.python_version(),
        **{name: _version(name) for name in ("loftq", *PACKAGES)},
        "commit": commit(),
        "date": datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%d"),
    }


def device_name(device: str) -> str:
    """The GPU's own name, or the processor's architecture with the threads that torch uses."""
    import torch

    if device.startswith("cuda"):
        return torch.cuda.get_device_name(device)
    return f"{platform.machine()} CPU, {torch.get_num_threads()} threads"


@cache
def commit() -> str:
    """Commit of the source tree that this module runs from; "" for an installed package.

    "+" marks a tree with changes that are not committed.
    """
    if not _git("ls-files", "--error-unmatch", Path(__file__).name):
        return ""  # installed into somebody else's repository
    changed = _git("status", "--porcelain", "--", str(HERE.parents[1]))
    return _git("rev-parse", "--short=10", "HEAD") + ("+" if changed else "")


def _git(*words: str) -> str:
    try:
        ran = subprocess.run(
            ["git", *words], cwd=HERE, capture_output=True, text=True, timeout=10, check=False
        )
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return ran.stdout.strip() if ran.returncode == 0 else ""


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return "not installed"
