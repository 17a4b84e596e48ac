"""Can this machine run loftq, and what would it lack? Looks only; nothing here may crash."""

from __future__ import annotations

import os
import re
import shutil
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from loftq.integrations.engines import READERS, in_range, version

REQUIRED = {
    "torch": ("2.11", None),
    "transformers": ("5.17", "6"),
    "peft": ("0.21", None),
    "accelerate": ("1.15", None),
    "safetensors": ("0.6", None),
    "huggingface_hub": ("1.5", None),
    "numpy": ("1.26", None),
    "typer": ("0.15", None),
    "rich": ("13", None),
    "pyyaml": ("6", None),
}
"""Package -> (oldest version, first version too new); as in pyproject.toml."""
EXTRAS = {
    "train": ("trl", "datasets", "jinja2"),
    "eval": ("rouge-score", "scikit-learn", "scipy"),
    "harness": ("lm-eval",),
    "report": ("jinja2", "matplotlib"),
    "demo": ("gguf",),
}
"""Extra -> packages it brings; as in pyproject.toml."""
VERBS: Mapping[str, Mapping[str, tuple[str, str | None]]] = {
    "chat": {},
    "train": {"trl": ("1.16", None), "datasets": ("4", None), "jinja2": ("3.1.6", None)},
    "report": {"jinja2": ("3.1", None), "matplotlib": ("3.9", None)},
}
"""What a user may want to do -> packages that it takes beyond the required ones."""
PYTHON = (3, 10)
LITTLE_DISK, LITTLE_MEMORY = 10 * 2**30, 4 * 2**30


@dataclass(frozen=True, kw_only=True)
class Check:
    """One thing that was looked at."""

    name: str
    status: str
    """ok, info, warn (works, with a limit) or fail (loftq cannot work)."""
    found: str
    advice: str = ""
    """What to do about it; "" where nothing is needed."""

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready."""
        return asdict(self)


def doctor(folder: Path | None = None) -> list[Check]:
    """Check Python, packages, devices and their kernels, disk and memory.

    Args:
        folder: where outputs would be written; None = the current folder.
    """
    checks: list[Check] = []
    for look in (
        _python,
        _packages,
        _devices,
        _kernels,
        _cpu_library,
        lambda: _disk(folder),
        _memory,
        _verbs,
        _extras,
        _readers,
    ):
        checks += _guarded(look)
    return checks


def _guarded(look: Callable[[], Iterator[Check]]) -> list[Check]:
    found: list[Check] = []
    try:
        found.extend(look())
    except Exception as error:  # a report about a broken machine must not break on it
        name = getattr(look, "__name__", "").strip("_") or "check"
        message = f"{type(error).__name__}: {error}"
        found.append(Check(name=name, status="warn", found=message, advice="could not be checked"))
    return found


def _python() -> Iterator[Check]:
    found = ".".join(map(str, sys.version_info[:3]))
    if sys.version_info >= PYTHON:
        yield Check(name="python", status="ok", found=found)
    else:
        wanted = ".".join(map(str, PYTHON))
        yield Check(name="python", status="fail", found=found, advice=f"use {wanted} or newer")


def _packages() -> Iterator[Check]:
    for name, (oldest, too_new) in REQUIRED.items():
        found = version(name)
        wanted = f"{name}>={oldest}" + (f",<{too_new}" if too_new else "")
        advice = f"pip install '{wanted}'"
        if found is None:
            yield Check(name=name, status="fail", found="not installed", advice=advice)
        elif not in_range(found, oldest, too_new):
            yield Check(name=name, status="fail", found=found, advice=advice)
        else:
            yield Check(name=name, status="ok", found=found)


def _devices() -> Iterator[Check]:
    try:
        import torch
    except Exception as error:  # missing, or present with a broken library
        yield Check(
            name="torch build",
            status="fail",
            found=f"import fails: {type(error).__name__}: {error}",
            advice="install torch as its site says for this system",
        )
        return
    yield _build(torch)
    if torch.cuda.is_available():
        for index in range(torch.cuda.device_count()):
            yield from _gpu(torch, index)
    elif torch.backends.mps.is_available():
        yield Check(
            name="gpu", status="info", found="Apple MPS", advice="untested; --device cpu is tested"
        )
    else:
        yield Check(
            name="gpu",
            status="info",
            found="none that torch can use",
            advice="everything works on the CPU, slower",
        )


def _build(torch: Any) -> Check:
    kind = "CPU"
    if torch.version.cuda:
        kind = f"CUDA {torch.version.cuda}"
    elif getattr(torch.version, "hip", None):
        kind = f"ROCm {torch.version.hip}"
    if kind == "CPU" and _nvidia_driver():
        return Check(
            name="torch build",
            status="warn",
            found="CPU only, but this machine has an NVIDIA driver",
            advice="install a CUDA build of torch to use the GPU",
        )
    if kind != "CPU" and not torch.cuda.is_available():
        return Check(
            name="torch build",
            status="warn",
            found=f"{kind}, but no GPU answers",
            advice="check the driver (nvidia-smi, rocm-smi) and CUDA_VISIBLE_DEVICES",
        )
    return Check(name="torch build", status="ok", found=kind)


def _nvidia_driver() -> bool:
    return Path("/proc/driver/nvidia/version").exists() or shutil.which("nvidia-smi") is not None


def _gpu(torch: Any, index: int) -> Iterator[Check]:
    name = f"gpu {index}"
    free, total = torch.cuda.mem_get_info(index)
    label = f"{torch.cuda.get_device_name(index)}, {gib(free)} of {gib(total)} free"
    yield Check(name=name, status="ok", found=label)
    with torch.cuda.device(index):
        native = torch.cuda.is_bf16_supported(including_emulation=False)
    if native:
        yield Check(name=f"{name} bfloat16", status="ok", found="supported")
    else:
        yield Check(
            name=f"{name} bfloat16",
            status="warn",
            found="not supported by this GPU",
            advice="quantizing is not affected; load with dtype=torch.float16 (loftq.load(OUT, "
            "dtype=torch.float16), loftq eval ... dtype=float16)",
        )


def _kernels() -> Iterator[Check]:
    try:
        import torch
    except Exception:  # _devices has said so
        return
    if not torch.cuda.is_available():
        return
    from loftq.ops import dispatch

    kinds = (
        ("kernels", dispatch.why_no_kernels, "weights are unpacked before each product"),
        ("CUDA C++", dispatch.why_no_cuda, "products of few tokens are Triton's, and slower"),
        ("decoding", dispatch.why_no_decoding, "each token takes several times as many launches"),
        ("training", dispatch.why_no_pointwise, "norms and gates of a training step are slower"),
    )
    for index in range(torch.cuda.device_count()):
        for kind, look, limit in kinds:
            why = look(torch.device("cuda", index))
            yield Check(
                name=f"gpu {index} {kind}",
                status="warn" if why else "ok",
                found=why or "a trial of each gave the right values",
                advice=f"everything works, but {limit}" if why else "",
            )


def _cpu_library() -> Iterator[Check]:
    try:
        import torch
    except Exception:  # _devices has said so
        return
    from loftq.ops.cpu import library

    why, name = library.why_no_library(), "cpu library"
    if why:
        slow = "everything works, but weights are unpacked before each product and chat is slower"
        yield Check(name=name, status="info", found=why, advice=slow)
        return
    found = library.find_library()
    assert found is not None
    used = f"products use {library.current_isa(found)} on {torch.get_num_threads()} threads"
    if library.openmp_fork() is None:
        used = f"products use {library.current_isa(found)} on one thread: torch has no OpenMP here"
    yield Check(name=name, status="ok", found=f"{used}; this CPU has {', '.join(found.isas)}")


def _disk(folder: Path | None) -> Iterator[Check]:
    place = Path.cwd() if folder is None else folder
    free = shutil.disk_usage(place).free
    little = free < LITTLE_DISK
    yield Check(
        name="disk",
        status="warn" if little else "ok",
        found=f"{gib(free)} free in {place}",
        advice="`loftq plan MODEL` says how much an output needs" if little else "",
    )


def _memory() -> Iterator[Check]:
    free = available_memory()
    if free is None:
        yield Check(name="memory", status="info", found="unknown on this system")
        return
    little = free < LITTLE_MEMORY
    yield Check(
        name="memory",
        status="warn" if little else "ok",
        found=f"{gib(free)} available, {os.cpu_count()} CPUs",
        advice="`loftq plan MODEL` says how much a run needs" if little else "",
    )


def available_memory() -> int | None:
    """Bytes that a new process may use: the system's, or what is left of the container's limit."""
    found = [b for b in (_system_memory(), _container_memory()) if b is not None]
    return min(found, default=None)


def _system_memory() -> int | None:
    try:
        text = Path("/proc/meminfo").read_text()
    except OSError:
        return None
    line = re.search(r"^MemAvailable:\s+(\d+) kB", text, re.MULTILINE)
    return int(line[1]) * 1024 if line else None


def _container_memory(root: Path = Path("/sys/fs/cgroup")) -> int | None:
    try:
        limit = int((root / "memory.max").read_text())
        used = int((root / "memory.current").read_text())
        statistics = (root / "memory.stat").read_text()
    except (OSError, ValueError):  # no cgroup v2, or "max": no limit
        return None
    cache = re.search(r"^inactive_file (\d+)", statistics, re.MULTILINE)  # given back on demand
    return max(0, limit - used + (int(cache[1]) if cache else 0))


def _verbs() -> Iterator[Check]:
    """What can be done here, and on which device."""
    import torch

    where = "on the GPU" if torch.cuda.is_available() else "on the CPU"
    for verb, packages in VERBS.items():
        lacking = [
            wanted for name, range_ in packages.items() if (wanted := _lacking(name, range_))
        ]
        works = "works here" if verb == "report" else f"works here, {where}"
        yield Check(
            name="report pages" if verb == "report" else f"loftq {verb}",
            status="info" if lacking else "ok",
            found=f"needs {', '.join(lacking)}" if lacking else works,
            advice=f"pip install 'loftq[{verb}]'" if lacking else "",
        )


def _lacking(name: str, range_: tuple[str, str | None]) -> str:
    """The requirement that is not met, or ""."""
    oldest, too_new = range_
    found = version(name)
    if found is not None and in_range(found, oldest, too_new):
        return ""
    return f"{name}>={oldest}" + ("" if found is None else f" (found {found})")


def _extras() -> Iterator[Check]:
    for extra, packages in EXTRAS.items():
        missing = [package for package in packages if version(package) is None]
        yield Check(
            name=f"extra {extra}",
            status="info" if missing else "ok",
            found=f"without {', '.join(missing)}" if missing else "installed",
            advice=f"pip install 'loftq[{extra}]' if you need it" if missing else "",
        )


def _readers() -> Iterator[Check]:
    """What reads exports here: none of it is needed to write them."""
    for reader in READERS:
        found, does = version(reader.package), f"to read {reader.reads} here"
        advice = f"pip install '{reader.package}>={reader.oldest}' {does}"
        if found is None:
            status, found = "info", "not installed"
        else:
            status = "ok" if in_range(found, reader.oldest, None) else "warn"
        yield Check(
            name=f"reads exports: {reader.package}",
            status=status,
            found=found,
            advice="" if status == "ok" else advice,
        )


def gib(count: int) -> str:
    """Bytes as GiB."""
    return f"{count / 2**30:.1f} GiB"
