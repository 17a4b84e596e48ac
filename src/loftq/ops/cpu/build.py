"""Compile the C++ library with the system's compiler, into the user's cache folder.

The file's name holds a hash of the sources, of the compiler's version and the machine, so that an
upgrade of loftq never loads an older library, and one home serves several machines. It appears
whole or not at all.
"""

from __future__ import annotations

import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
from functools import lru_cache
from pathlib import Path

SOURCES = Path(__file__).parent / "csrc"
FLAGS = (
    "-std=c++17", "-O3", "-fPIC", "-fvisibility=hidden",
    "-ffp-contract=off",  # a product and a sum are fused only where a kernel says so
)  # fmt: skip
AVX2 = ("-mavx2", "-mfma", "-mf16c")
AVX512 = (*AVX2, "-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl")
UNITS: dict[str, dict[str, tuple[str, ...]]] = {
    "x86_64": {"api": (), "decode": (), "scalar": (), "avx2": AVX2, "avx512": AVX512},
    "aarch64": {"api": (), "decode": (), "scalar": (), "neon": ()},
}
"""Machine -> source file -> its own flags: code of one instruction set stays in one file."""
ANY: dict[str, tuple[str, ...]] = {"api": (), "decode": (), "scalar": ()}
SAME_MACHINE = {"amd64": "x86_64", "arm64": "aarch64"}
COMPILERS = ("c++", "g++", "clang++")


class BuildError(OSError):
    """The library cannot be compiled here; the message says why and what to do."""


def machine() -> str:
    """This machine's architecture by one of its names: x86_64, aarch64, ..."""
    name = platform.machine().lower()
    return SAME_MACHINE.get(name, name)


def cache_folder() -> Path:
    """Where libraries lie: LOFTQ_CACHE/cpu, else loftq/cpu in the user's cache."""
    home = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(os.environ.get("LOFTQ_CACHE") or Path(home) / "loftq") / "cpu"


@lru_cache
def sources_hash() -> str:
    """16 hexadecimal digits over the sources and the flags."""
    digest = hashlib.sha256(repr((FLAGS, UNITS)).encode())
    for path in sorted(SOURCES.iterdir()):
        if path.suffix in (".h", ".cpp"):
            digest.update(path.name.encode() + b"\0" + path.read_bytes() + b"\0")
    return digest.hexdigest()[:16]


def built_library() -> Path | None:
    """The library of these sources for this machine, the newest if several compilers made one."""
    found = cache_folder().glob(f"{sources_hash()}-*-{machine()}.so")
    return max(found, key=lambda path: path.stat().st_mtime, default=None)


def find_compiler() -> str:
    """Path of a C++ compiler: that of CXX, else the first of c++, g++, clang++.

    Raises:
        BuildError: there is none.
    """
    asked = os.environ.get("CXX")
    for name in (asked,) if asked else COMPILERS:
        if path := shutil.which(name):
            return path
    wanted = f"CXX={asked} is not a program" if asked else f"none of {', '.join(COMPILERS)} exists"
    raise BuildError(
        f"no C++ compiler: {wanted}. Install one (Debian, Ubuntu: apt install g++; macOS: "
        "xcode-select --install) or set CXX."
    )


def build_library() -> Path:
    """Compile the library and return its path; one that exists for this compiler is kept.

    Raises:
        BuildError: no compiler, one that does not compile the sources, or no folder to write to.
    """
    if os.name != "posix":
        raise BuildError(f"the library is built on Linux and macOS only, this is {os.name}.")
    compiler = find_compiler()
    version = _run([compiler, "--version"])
    mark = hashlib.sha256(f"{compiler}\n{version}".encode()).hexdigest()[:8]
    target = cache_folder() / f"{sources_hash()}-{mark}-{machine()}.so"
    if target.exists():
        os.utime(target)  # now the newest: what was asked for last is what is loaded
        return target
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=target.parent) as folder:
            os.replace(_compile(compiler, Path(folder)), target)
    except BuildError:
        raise
    except OSError as error:
        raise BuildError(
            f"{target.parent}: {error.strerror}. Set LOFTQ_CACHE to a folder that can be written."
        ) from error
    return target


def _compile(compiler: str, folder: Path) -> Path:
    objects = []
    for name, own in UNITS.get(machine(), ANY).items():
        objects.append(str(folder / f"{name}.o"))
        source = str(SOURCES / f"{name}.cpp")
        _run([compiler, *FLAGS, *own, "-c", source, "-o", objects[-1]])
    library = folder / "library.so"
    _run([compiler, "-shared", *objects, "-o", str(library)])
    return library


def _run(command: list[str]) -> str:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        errors = [line for line in done.stderr.splitlines() if "error" in line.lower()]
        first = errors[0] if errors else done.stderr.strip()[:300] or f"status {done.returncode}"
        raise BuildError(f"{' '.join(command)}: {first}")
    return done.stdout
