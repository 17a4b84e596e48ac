"""Runs the CPU library for 64-bit Arm on this machine: a cross compiler and qemu's user mode.

Calls and all that they point to are laid out in one piece of memory, an `Image`, which a small
program (cpu_on_arm_sources/replay.cpp) reads, runs and writes back. Structures have the same layout
on both machines: pointers of 8 bytes, little-endian.
"""

from __future__ import annotations

import ctypes
import shutil
import subprocess
from pathlib import Path

import torch
from torch import Tensor

from loftq.ops.cpu.build import FLAGS, SOURCES, UNITS

REPLAY = Path(__file__).parent / "cpu_on_arm_sources" / "replay.cpp"
COMPILER, EMULATOR = "aarch64-linux-gnu-g++", "qemu-aarch64"
FUNCTIONS = ("fit", "round", "pack", "dequantize", "project")
"""By their number in replay.cpp."""
CALLS, STRUCTURES, SIZE, LINE = 1000, 1 << 18, 1 << 24, 64
HEADER, CALL = 4, 10  # 8-byte words


def why_not() -> str:
    """Reason that nothing can be run here; "" if it can."""
    missing = [name for name in (COMPILER, EMULATOR) if shutil.which(name) is None]
    return f"no {', '.join(missing)} (Debian: g++-aarch64-linux-gnu, qemu-user)" if missing else ""


def build_replay(folder: Path) -> Path:
    """The program, with the library's units for this machine linked in."""
    units, objects = UNITS["aarch64"], []
    for name, own in units.items():
        objects.append(str(folder / f"{name}.o"))
        source = str(SOURCES / f"{name}.cpp")
        subprocess.run([COMPILER, *FLAGS, *own, "-c", source, "-o", objects[-1]], check=True)
    program = folder / "replay"
    flags = ["-std=c++17", "-O1", "-static", f"-I{SOURCES}", str(REPLAY)]
    subprocess.run([COMPILER, *flags, *objects, "-o", str(program)], check=True)
    return program


class Image:
    """Memory of calls, structures and tensors; `run` changes the tensors put into it."""

    def __init__(self) -> None:
        self.memory = torch.zeros(SIZE, dtype=torch.uint8)
        self.words = self.memory.view(torch.int64)
        self.place = self.memory.data_ptr()
        self.calls, self.structure, self.tensor = 0, 8 * (HEADER + CALLS * CALL), STRUCTURES

    def put(self, tensor: Tensor, offset: int = 0) -> Tensor:
        """A copy of the tensor within the image, `offset` bytes off the start of a line."""
        data = tensor.contiguous().view(torch.uint8).flatten()
        at = self.tensor + offset
        self.tensor = -(-(at + data.numel()) // LINE) * LINE
        assert self.tensor <= SIZE, "the image is full"
        place = self.memory[at : at + data.numel()]
        place.copy_(data)
        if offset:  # torch knows no numbers of several bytes at any address
            return place.view(tensor.shape)
        return place.view(tensor.dtype).view(tensor.shape)

    def address(self, structure: ctypes.Structure) -> int:
        """Where a copy of the structure lies."""
        data = torch.frombuffer(bytearray(structure), dtype=torch.uint8)
        at, self.structure = self.structure, self.structure + -(-len(data) // 8) * 8
        assert self.structure <= STRUCTURES, "the image is full"
        self.memory[at : at + len(data)] = data
        return self.place + at

    def call(self, name: str, *arguments: int | Tensor | ctypes.Structure | None) -> None:
        """Note down loftq_<name>(arguments)."""
        at = HEADER + CALL * self.calls
        self.words[at : at + 2] = torch.tensor([FUNCTIONS.index(name), -1])
        for i, argument in enumerate(arguments):
            self.words[at + 2 + i] = self._word(argument)
        self.calls += 1
        assert self.calls <= CALLS, "the image is full"

    def run(self, program: Path, folder: Path) -> None:
        """Run all calls; raises where one failed."""
        header = torch.tensor([self.place, SIZE, STRUCTURES, self.calls])
        self.words[:HEADER] = header
        image, result = folder / "image", folder / "result"
        image.write_bytes(self.memory.numpy().tobytes())
        subprocess.run([EMULATOR, str(program), str(image), str(result)], check=True)
        self.memory.copy_(torch.frombuffer(bytearray(result.read_bytes()), dtype=torch.uint8))
        results = self.words[HEADER + 1 : HEADER + CALL * self.calls : CALL]
        assert not results.any(), f"calls returned {results.tolist()}"

    def _word(self, argument: int | Tensor | ctypes.Structure | None) -> int:
        if isinstance(argument, Tensor):
            return argument.data_ptr()
        if isinstance(argument, ctypes.Structure):
            return self.address(argument)
        return argument or 0
