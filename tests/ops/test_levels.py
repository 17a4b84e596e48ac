"""The decoding assembly against the packed layout, on the CPU."""

import numpy as np
import pytest
import torch

from loftq.formats import parse_format
from loftq.formats.packing import pack_codes
from loftq.ops.triton.levels import UNIT, level_asm, level_words
from ptx import execute


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["nf4", "nf3", "nf2", "iq4nl"])
def test_assembly_gives_the_level_of_every_code_in_every_place(name, dtype, generator):
    spec = parse_format(name)
    count = UNIT[spec.bits]
    levels = torch.tensor(spec.levels).to(dtype)
    random = torch.randint(0, 2**spec.bits, (200, count), generator=generator)
    every = torch.arange(2**spec.bits)[:, None].expand(-1, count)
    codes = torch.cat([random, every]).to(torch.uint8)
    packed = pack_codes(codes, spec.bits).numpy()
    words = [packed[:, :4].copy().view(np.uint32)[:, 0]]
    if spec.bits == 3:
        words.append(packed[:, 4:].copy().view(np.uint16)[:, 0].astype(np.uint32))
    table = level_words(spec.levels, dtype).numpy().view(np.uint32)
    words += list(table if spec.bits == 4 else table[[0, 1, 4, 5]])
    inputs = {f"${count + i}": word for i, word in enumerate(words)}
    found = np.stack(execute(level_asm(spec.bits), inputs), -1)
    assert torch.equal(torch.from_numpy(found).view(dtype), levels[codes.long()])
