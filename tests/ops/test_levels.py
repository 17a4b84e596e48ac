"""The decoding assembly, run by a small interpreter of the PTX that it uses, against the layout."""

import re

import pytest
import torch

from loftq.formats import parse_format
from loftq.formats.packing import pack_codes
from loftq.ops.triton.levels import UNIT, level_asm, level_words

WORD = 0xFFFFFFFF


def permute(a: int, b: int, selector: int) -> int:
    """PRMT: bytes of a, then b, by the low four nibbles; a nibble's top bit spreads the sign."""
    stored = [(value >> 8 * i) & 255 for value in (a, b) for i in range(4)]
    picked = 0
    for i in range(4):
        nibble = (selector >> 4 * i) & 15
        byte = stored[nibble & 7]
        picked |= (byte if nibble < 8 else 255 * (byte >> 7)) << 8 * i
    return picked


def select(a: int, b: int, c: int, table: int) -> int:
    """LOP3: bit k of the table where (a, b, c) spell k."""
    bits = [
        table >> (((a >> i & 1) << 2) | ((b >> i & 1) << 1) | (c >> i & 1)) & 1 for i in range(32)
    ]
    return sum(bit << i for i, bit in enumerate(bits))


OPERATIONS = {
    "and.b32": lambda a, b: a & b,
    "or.b32": lambda a, b: a | b,
    "shl.b32": lambda a, b: a << b & WORD,
    "shr.u32": lambda a, b: a >> b,
    "cvt.u32.u16": lambda a: a,
    "prmt.b32": permute,
    "lop3.b32": select,
}


def execute(asm: str, inputs: dict[str, int]) -> list[int]:
    """The outputs $0, $1, ... of a block of assembly."""
    registers, outputs = dict(inputs), {}
    for line in asm.strip("{}\n").split("\n")[1:]:
        if pair := re.fullmatch(r"mov\.b32 \{\$(\d+), \$(\d+)\}, p;", line):
            outputs[int(pair[1])], outputs[int(pair[2])] = (
                registers["p"] & 65535,
                registers["p"] >> 16,
            )
            continue
        name, operands = line.rstrip(";").split(" ", 1)
        target, *sources = operands.split(", ")
        values = [registers[s] if s in registers else int(s, 0) for s in sources]
        registers[target] = OPERATIONS[name](*values)
    return [outputs[i] for i in range(len(outputs))]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["nf4", "nf3", "nf2", "iq4nl"])
def test_assembly_gives_the_level_of_every_code_in_every_place(name, dtype, generator):
    spec = parse_format(name)
    count = UNIT[spec.bits]
    levels = torch.tensor(spec.levels).to(dtype)
    table = [word & WORD for word in level_words(spec.levels, dtype).tolist()]
    table = table if spec.bits == 4 else [table[i] for i in (0, 1, 4, 5)]
    random = torch.randint(0, 2**spec.bits, (20, count), generator=generator)
    every = torch.arange(2**spec.bits)[:, None].expand(-1, count)
    for codes in torch.cat([random, every]).to(torch.uint8):
        packed = pack_codes(codes[None], spec.bits)[0].tolist()
        words = [int.from_bytes(bytes(packed[:4]), "little")]
        words += [int.from_bytes(bytes(packed[4:]), "little")] * (spec.bits == 3)
        inputs = {f"${count + i}": word for i, word in enumerate([*words, *table])}
        found = torch.tensor(execute(level_asm(spec.bits), inputs), dtype=torch.uint16).view(dtype)
        assert torch.equal(found, levels[codes.long()])
