"""CUDA C++ compiled when it is first used, by the NVRTC library that comes with PyTorch.

No toolkit and no build step: `libnvrtc` turns a source file of this package and its definitions
into machine code for the GPU at hand, `libcuda` loads and launches it. What either refuses is a
`RuntimeError` with its own words.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterable, Sequence
from functools import cache
from importlib.metadata import PackageNotFoundError, files
from importlib.resources import files as resources
from typing import Any

import torch

HEADERS = (
    "instructions.cuh", "decode.cuh", "work.cuh", "adapters.cuh", "early.cuh", "slabs.cuh",
)  # fmt: skip
MAX_DYNAMIC_SHARED = 8  # CUfunction_attribute
MULTIPROCESSORS, MAX_SHARED_OPT_IN = 16, 97  # CUdevice_attribute
OVERLAP = 6  # CUlaunchAttributeID: programmatic stream serialization


class _Attribute(ctypes.Structure):
    _fields_ = (("id", ctypes.c_int), ("_pad", ctypes.c_int), ("value", ctypes.c_int * 16))


class _Launch(ctypes.Structure):
    _fields_ = (
        ("grid", ctypes.c_uint * 3), ("block", ctypes.c_uint * 3), ("shared", ctypes.c_uint),
        ("stream", ctypes.c_void_p), ("attributes", ctypes.POINTER(_Attribute)),
        ("count", ctypes.c_uint),
    )  # fmt: skip


class Kernel:
    """One compiled function on one device."""

    def __init__(self, function: ctypes.c_void_p, shared: int) -> None:
        self._function, self._shared = function, shared

    def __call__(
        self,
        grid: tuple[int, int, int],
        threads: int,
        arguments: Sequence[Any],
        *,
        shared: int = 0,
        overlap: bool = False,
    ) -> None:
        """Launch on the current stream of the current device.

        Args:
            grid: blocks.
            threads: of a block.
            arguments: in the order of the parameters, with their exact types.
            shared: bytes of dynamic shared memory.
            overlap: start while the kernel before it still runs; the kernel waits itself.
        """
        if shared > self._shared:
            _check(_driver().cuFuncSetAttribute(self._function, MAX_DYNAMIC_SHARED, shared))
            self._shared = shared
        attribute = _Attribute(id=OVERLAP)
        attribute.value[0] = 1
        launch = _Launch(
            grid, (threads, 1, 1), shared, torch.cuda.current_stream().cuda_stream,
            ctypes.pointer(attribute), int(overlap),
        )  # fmt: skip
        pointers = (ctypes.c_void_p * len(arguments))(*map(ctypes.addressof, arguments))
        _check(_driver().cuLaunchKernelEx(ctypes.byref(launch), self._function, pointers, None))


@cache
def room(device: torch.device) -> tuple[int, int]:
    """Multiprocessors of a device, and bytes of shared memory that one block may have."""
    found, handle, values = ctypes.c_int(), ctypes.c_int(), []
    with torch.cuda.device(device):
        _check(_driver().cuCtxGetDevice(ctypes.byref(handle)))
    for attribute in (MULTIPROCESSORS, MAX_SHARED_OPT_IN):
        _check(_driver().cuDeviceGetAttribute(ctypes.byref(found), attribute, handle))
        values.append(found.value)
    return values[0], values[1]


@cache
def kernel(
    source: str, name: str, definitions: tuple[tuple[str, int], ...], device: torch.device
) -> Kernel:
    """Function `name` of the file `source` beside this one, compiled for `device` once.

    Raises:
        RuntimeError: NVRTC is missing or refuses the source, or the driver refuses the code.
    """
    module, function = ctypes.c_void_p(), ctypes.c_void_p()
    code = _machine_code(source, definitions, torch.cuda.get_device_capability(device))
    with torch.cuda.device(device):
        _check(_driver().cuModuleLoadData(ctypes.byref(module), code))
        _check(_driver().cuModuleGetFunction(ctypes.byref(function), module, name.encode()))
    return Kernel(function, 48 * 1024)


@cache
def _machine_code(
    source: str, definitions: tuple[tuple[str, int], ...], capability: tuple[int, int]
) -> bytes:
    options = ["--std=c++17", f"--gpu-architecture=sm_{capability[0]}{capability[1]}"]
    options += [f"-D{name}={value}" for name, value in definitions]
    nvrtc, program = _nvrtc(), ctypes.c_void_p()
    headers, names = _strings(map(_text, HEADERS)), _strings(name.encode() for name in HEADERS)
    file = (_text(source), source.encode())
    _ask(nvrtc.nvrtcCreateProgram(ctypes.byref(program), *file, len(HEADERS), headers, names))
    try:
        encoded = _strings(option.encode() for option in options)
        if nvrtc.nvrtcCompileProgram(program, len(options), encoded):
            log = _read(nvrtc.nvrtcGetProgramLogSize, nvrtc.nvrtcGetProgramLog, program)
            raise RuntimeError(f"{source}: {log.decode(errors='replace').strip()}")
        return _read(nvrtc.nvrtcGetCUBINSize, nvrtc.nvrtcGetCUBIN, program)
    finally:
        nvrtc.nvrtcDestroyProgram(ctypes.byref(program))


def _strings(texts: Iterable[bytes]) -> ctypes.Array[ctypes.c_char_p]:
    listed = list(texts)
    return (ctypes.c_char_p * len(listed))(*listed)


def _text(name: str) -> bytes:
    return (resources("loftq.ops.cuda") / name).read_bytes()


def _read(size_of: Callable, read: Callable, program: ctypes.c_void_p) -> bytes:
    size = ctypes.c_size_t()
    _ask(size_of(program, ctypes.byref(size)))
    buffer = ctypes.create_string_buffer(size.value)
    _ask(read(program, buffer))
    return buffer.raw


@cache
def _driver() -> ctypes.CDLL:
    return ctypes.CDLL("libcuda.so.1")


@cache
def _nvrtc() -> ctypes.CDLL:
    """The library of PyTorch's CUDA version: loaded already, on the path, or in its wheel."""
    name = f"libnvrtc.so.{(torch.version.cuda or '0').split('.')[0]}"
    candidates = [name, *_in_wheels(name)]
    for candidate in candidates:
        try:
            return ctypes.CDLL(candidate)
        except OSError:
            continue
    raise RuntimeError(f"{name} was not found; PyTorch's CUDA wheels bring it")


def _in_wheels(name: str) -> list[str]:
    found = []
    for wheel in ("nvidia-cuda-nvrtc", "nvidia-cuda-nvrtc-cu12"):
        try:
            listed = files(wheel) or []
        except PackageNotFoundError:
            continue
        found += [str(path.locate()) for path in listed if path.name == name]
    return found


def _check(code: int) -> None:
    if code:
        text = ctypes.c_char_p()
        _driver().cuGetErrorString(code, ctypes.byref(text))
        raise RuntimeError(f"CUDA: {(text.value or b'unknown error').decode()} ({code})")


def _ask(code: int) -> None:
    if code:
        _nvrtc().nvrtcGetErrorString.restype = ctypes.c_char_p
        raise RuntimeError(f"NVRTC: {_nvrtc().nvrtcGetErrorString(code).decode()}")
