"""Runs the CUDA sources of loftq.ops.cuda on the CPU, the threads of a block taking turns.

Instructions that C++ has no word for are replaced (cuda_on_cpu_sources/instructions.cuh); indexing,
decoding, the order of operands and the sums are the source's own.
"""

import ctypes
import shutil
import subprocess
from importlib.resources import files
from pathlib import Path

from loftq.ops.cuda.compiler import HEADERS

HERE = Path(__file__).parent / "cuda_on_cpu_sources"
ROOM = (4, 232_448)
"""Multiprocessors and shared memory of the machine that is played."""


class Compiler:
    """Stands in for `loftq.ops.cuda.compiler.kernel`; keeps what it builds under `folder`."""

    def __init__(self, folder: Path) -> None:
        self.folder, self._built = folder, {}

    def __call__(self, source, name, definitions, device):
        key = (source, name, definitions)
        if key not in self._built:
            self._built[key] = self._build(*key)
        function = self._built[key].run

        def run(grid, threads, arguments, *, shared=0, overlap=False):
            arguments = [
                ctypes.byref(a) if isinstance(a, ctypes.Structure) else a for a in arguments
            ]
            function((ctypes.c_int * 3)(*grid), threads, *arguments)

        return run

    def _build(self, source, name, definitions):
        folder = self.folder / str(len(self._built))
        shutil.copytree(HERE, folder)
        for file in (source, *HEADERS[1:]):
            shutil.copy(str(files("loftq.ops.cuda") / file), folder)
        flags = [f"-D{key}={value}" for key, value in definitions]
        flags += [f'-DSOURCE="{source}"', f"-DNAME={name}"]
        command = ["g++", "-std=c++20", "-O1", "-shared", "-fPIC", "-w", *flags]
        subprocess.run([*command, "entry.cc", "-o", "kernels.so"], cwd=folder, check=True)
        return ctypes.CDLL(str(folder / "kernels.so"))
