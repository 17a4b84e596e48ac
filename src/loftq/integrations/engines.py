"""Packages that read exports: what each is for, and the first release that reads what we write.

Imports nothing heavy, so that `loftq doctor` can ask on a machine where nothing else works.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from importlib import metadata


@dataclass(frozen=True, kw_only=True)
class Reader:
    """A package that an engine needs for an export."""

    package: str
    oldest: str
    """First release that reads the layout as we write it."""
    targets: tuple[str, ...]
    """Targets of `loftq export --to` that it reads."""
    engine: str
    """The engine that uses it, as --for names it."""

    @property
    def reads(self) -> str:
        """What it reads, and where: "gptq exports in transformers"."""
        return f"{', '.join(self.targets)} exports in {self.engine}"


READERS = (
    Reader(package="bitsandbytes", oldest="0.46.1", targets=("bnb",), engine="transformers"),
    Reader(
        package="compressed-tensors",
        oldest="0.15",
        targets=("compressed-tensors",),
        engine="transformers",
    ),
    Reader(package="gptqmodel", oldest="7.0", targets=("gptq",), engine="transformers"),
    Reader(package="optimum", oldest="2.1", targets=("gptq",), engine="transformers"),
    Reader(
        package="vllm", oldest="0.11", targets=("compressed-tensors", "gptq", "bnb"), engine="vllm"
    ),
    Reader(package="llama-cpp-python", oldest="0.3", targets=("gguf",), engine="llama.cpp"),
)
"""One row a package; the versions are the oldest that we know to read our layouts."""
WRITER, OLDEST_WRITER = "gguf", "0.17"
"""The package that GGUF files are written with; no other export needs one."""


def version(package: str) -> str | None:
    """Version of an installed package, else None."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def too_old(target: str) -> list[str]:
    """What to say of the packages installed here that are too old to read `target`."""
    return [
        f"{reader.package} {found} is installed here and too old to read this export in "
        f"{reader.engine}: pip install '{reader.package}>={reader.oldest}'"
        for reader in READERS
        if target in reader.targets
        and (found := version(reader.package)) is not None
        and not in_range(found, reader.oldest, None)
    ]


def in_range(version: str, oldest: str, too_new: str | None) -> bool:
    """Whether oldest <= version < too_new by release numbers; 2.13.0+cpu counts as 2.13.0."""
    release = _release(version)
    return _release(oldest) <= release and (too_new is None or release < _release(too_new))


def _release(version: str) -> tuple[int, ...]:
    numbers = re.match(r"\d+(\.\d+)*", version)
    release = [int(part) for part in numbers[0].split(".")] if numbers else []
    while release and release[-1] == 0:
        release.pop()
    return tuple(release)
