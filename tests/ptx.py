"""The few PTX instructions of ops/triton/levels.py in numpy, also for Triton's interpreter."""

from __future__ import annotations

import re
from typing import Any

import numpy as np

Word = np.uint32


def permute(a: Any, b: Any, selector: Any) -> Any:
    """PRMT: bytes of a, then b, by the low four nibbles; a nibble's top bit spreads the sign."""
    a, b, selector = np.broadcast_arrays(a, b, selector)
    stored = np.stack([value >> Word(8 * i) & Word(255) for value in (a, b) for i in range(4)])
    picked = np.zeros_like(a)
    for i in range(4):
        nibble = selector >> Word(4 * i) & Word(15)
        byte = np.take_along_axis(stored, (nibble & Word(7))[None].astype(np.int64), 0)[0]
        byte = np.where(nibble < 8, byte, Word(255) * (byte >> Word(7)))
        picked = picked | byte << Word(8 * i)
    return picked


def select(a: Any, b: Any, c: Any, table: Any) -> Any:
    """LOP3 with the one table in use: c ? b : a, bit by bit."""
    assert table == 0xD8
    return a & ~c | b & c


OPERATIONS = {
    "and.b32": lambda a, b: a & b,
    "or.b32": lambda a, b: a | b,
    "shl.b32": lambda a, b: a << b,
    "shr.u32": lambda a, b: a >> b,
    "cvt.u32.u16": lambda a: a,
    "prmt.b32": permute,
    "lop3.b32": select,
}


def execute(asm: str, inputs: dict[str, Any]) -> list[Any]:
    """The outputs $0, $1, ... (uint16) of a block of assembly on uint32 inputs of any shape."""
    registers, outputs = dict(inputs), {}
    for line in asm.strip("{}\n").split("\n")[1:]:
        if pair := re.fullmatch(r"mov\.b32 \{\$(\d+), \$(\d+)\}, p;", line):
            outputs[int(pair[1])] = (registers["p"] & Word(65535)).astype(np.uint16)
            outputs[int(pair[2])] = (registers["p"] >> Word(16)).astype(np.uint16)
            continue
        name, operands = line.rstrip(";").split(" ", 1)
        target, *sources = operands.split(", ")
        values = [registers[s] if s in registers else Word(int(s, 0)) for s in sources]
        registers[target] = OPERATIONS[name](*values)
    return [outputs[i] for i in range(len(outputs))]


def teach_triton() -> None:
    """Let Triton's interpreter, which knows no assembly, run ours. For a process of its own."""
    import triton.language as tl
    from triton.runtime import interpreter

    class Results(list):
        get_result = list.__getitem__

    def create_inline_asm(
        self: Any, asm: str, constraints: str, values: list[Any], *rest: Any
    ) -> Results:
        first = constraints.count("=h")
        unsigned = {2: np.uint16, 4: np.uint32}
        inputs = {
            f"${first + i}": v.data.view(unsigned[v.data.dtype.itemsize]).astype(Word)
            for i, v in enumerate(values)
        }
        outputs = execute(asm, inputs)
        return Results(interpreter.TensorHandle(o.view(np.int16), tl.int16) for o in outputs)

    interpreter.InterpreterBuilder.create_inline_asm = create_inline_asm
    tl.core.block_type.to_ir = lambda self, builder: self
