"""SPEC.md is complete: a reader written from its text alone decodes what our code decodes.

The reader below knows nothing of `loftq`; it takes its tables from the document.
"""

from __future__ import annotations

import re
import struct
from pathlib import Path

import pytest
import torch

import loftq.checkpoint
from loftq.formats.codebooks import normal_float, symmetric_normal_float
from loftq.formats.packing import pack_codes
from loftq.formats.spec import component_shapes, known_formats, parse_format
from loftq.formats.tensor import QuantizedTensor
from loftq.ops.hadamard import column_signs
from loftq.ops.reference import dynamic_map
from tolerances import FLOAT32_ROUNDING

SPEC = (Path(loftq.checkpoint.__file__).parent / "SPEC.md").read_text()


def f32(x: float) -> float:
    """One float32 rounding: exact for a double sum, difference or product of float32 numbers."""
    return float(struct.unpack("<f", struct.pack("<f", x))[0])


def table(name: str) -> list[float]:
    found = re.search(rf"^    {name}: +((?:[-\d.e]+,?\s+)+)", SPEC, re.MULTILINE)
    assert found is not None, name
    return [f32(float(number)) for number in found[1].replace(",", " ").split()]


def spec_map() -> list[float]:
    p = table("p")
    return [-x for x in reversed(p)] + [0.0] + p + [1.0]


def bits_of(row: bytes, n: int, width: int) -> list[int]:
    return [row[i * width // 8] >> (i * width % 8) & (2**width - 1) for i in range(n)]


def row_values(row: bytes, n: int, bits: int) -> list[int]:
    if bits != 3:
        return bits_of(row, n, bits)
    low = -(-n // 4)
    high = bits_of(row[low:], n, 1)
    return [two + 4 * one for two, one in zip(bits_of(row[:low], n, 2), high, strict=True)]


def row_bytes(n: int, bits: int) -> int:
    return -(-n // 4) + -(-n // 8) if bits == 3 else -(-n * bits // 8)


def scales_of(data: dict[str, bytes], coding: str, count: int) -> list[float]:
    raw = data["weight_scale"]
    if coding == "dq":
        offset, *absmax = (x for (x,) in struct.iter_unpack("<f", data["weight_nested"]))
        levels = spec_map()
        return [f32(f32(levels[raw[n]] * absmax[n // 256]) + offset) for n in range(count)]
    if coding == "bf16":
        wide = b"".join(b"\0\0" + raw[k : k + 2] for k in range(0, len(raw), 2))
        return list(struct.unpack(f"<{count}f", wide))
    return list(struct.unpack(f"<{count}{'f' if coding == 'f32' else 'e'}", raw))


def decode(name: str, shape: tuple[int, int], data: dict[str, bytes]) -> list[list[float]]:
    """The weight, from the bytes of its tensors."""
    (rows, columns), (grid, group, coding, *rotation) = shape, name.split("-")
    bits = 4 if grid == "iq4nl" else int(grid[-1])
    size = int(group[1:]) if group.startswith("g") else columns
    groups = -(-columns // size)
    scales = scales_of(data, coding, 1 if group == "tensor" else rows * groups)
    levels = table(grid) if grid.startswith(("nf", "snf", "even", "iq")) else list(range(2**bits))
    weight = []
    for i in range(rows):
        width = row_bytes(columns, bits)
        codes = row_values(data["weight_packed"][i * width : (i + 1) * width], columns, bits)
        zeros: list[float] = [2 ** (bits - 1) if grid.startswith("sint") else 0] * groups
        if group == "tensor":
            zeros = list(struct.unpack("<f", data["weight_zero"]))
        elif grid.startswith("int"):
            width = row_bytes(groups, bits)
            zeros = list(row_values(data["weight_zero"][i * width : (i + 1) * width], groups, bits))
        row_scales = scales if group == "tensor" else scales[i * groups :]
        weight.append(
            [f32(row_scales[j // size] * f32(levels[c] - zeros[j // size])) for j, c in
             enumerate(codes)]
        )  # fmt: skip
    return [turned_back(row, int(rotation[0][1:])) for row in weight] if rotation else weight


def sign(j: int) -> int:
    m = j + 1
    m = (m ^ (m >> 16)) * 0x7FEB352D % 2**32
    m = (m ^ (m >> 15)) * 0x846CA68B % 2**32
    m = m ^ (m >> 16)
    return 1 - 2 * (m & 1)


def turned_back(v: list[float], block: int) -> list[float]:
    """Section 7, with sums in double."""
    w = []
    for j in range(len(v)):
        first = block * (j // block)
        terms = (v[first + k] * (-1) ** ((j - first) & k).bit_count() for k in range(block))
        w.append(sign(j) / block**0.5 * sum(terms))
    return w


def random_bytes(name: str, shape: tuple[int, int]) -> dict[str, torch.Tensor]:
    """Any bytes are a valid weight, but floats are kept finite."""
    spec, generator = parse_format(name), torch.Generator().manual_seed(len(name) + shape[1])
    tensors = {}
    for component, size in component_shapes(spec, shape).items():
        tensors[component] = torch.randint(0, 256, size, generator=generator, dtype=torch.uint8)
        whole = component == "weight_zero" and spec.group_size == -1
        if whole or component == "weight_nested" or component == "weight_scale":
            coding = "f32" if whole or component == "weight_nested" else spec.scale_coding
            dtype = {"f32": torch.float32, "bf16": torch.bfloat16, "f16": torch.float16}.get(coding)
            if dtype is not None:
                count = tensors[component].numel() // dtype.itemsize
                floats = torch.randn(count, generator=generator).to(dtype)
                tensors[component] = floats.view(torch.uint8).view(size)
    return tensors


NAMES = sorted(
    {str(parse_format(name)) for name in known_formats()}
    | {f"nf4-g64-{coding}" for coding in ("dq", "f16", "bf16", "f32")}
    | {f"int{bits}-{group}-f16" for bits in (2, 3, 4, 8) for group in ("g16", "channel")}
)


@pytest.mark.parametrize("shape", [(3, 64), (5, 200), (1, 1), (70, 65)])
@pytest.mark.parametrize("name", NAMES)
def test_reader_written_from_the_text_agrees_to_the_bit(name: str, shape: tuple[int, int]) -> None:
    tensors = random_bytes(name, shape)
    ours = QuantizedTensor.from_state_dict(parse_format(name), shape, tensors).dequantize()
    data = {key: bytes(tensor.flatten().tolist()) for key, tensor in tensors.items()}
    assert torch.equal(ours, torch.tensor(decode(name, shape, data), dtype=torch.float32))


@pytest.mark.parametrize("name", ["nf4-g64-dq-h64", "int3-g32-f16-h16", "snf2-channel-f32-h32"])
def test_reader_written_from_the_text_turns_rotated_weights_back(name: str) -> None:
    shape = (3, 192)
    tensors = random_bytes(name, shape)
    ours = QuantizedTensor.from_state_dict(parse_format(name), shape, tensors).dequantize()
    data = {key: bytes(tensor.flatten().tolist()) for key, tensor in tensors.items()}
    wanted = torch.tensor(decode(name, shape, data))
    torch.testing.assert_close(
        ours, wanted, rtol=0, atol=FLOAT32_ROUNDING * float(ours.abs().max())
    )


def test_printed_signs_are_ours() -> None:
    printed = re.search(r"`sign` begins `([-+ ]+)`", SPEC)
    assert printed is not None
    assert [{"+": 1, "-": -1}[mark] for mark in printed[1].split()] == [sign(j) for j in range(16)]
    assert column_signs(300).tolist() == [sign(j) for j in range(300)]


@pytest.mark.parametrize("name", [n for n in known_formats() if parse_format(n).levels])
def test_printed_codebooks_are_ours_to_the_bit(name: str) -> None:
    assert torch.equal(torch.tensor(parse_format(name).levels), torch.tensor(table(name)))


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_codebooks_are_ascending_and_span_the_unit_interval(bits: int) -> None:
    for levels in (normal_float(bits), symmetric_normal_float(bits)):
        assert list(levels) == sorted(set(levels))
        assert (levels[0], levels[-1], len(levels)) == (-1.0, 1.0, 2**bits)


def test_printed_dynamic_map_is_ours_to_the_bit() -> None:
    printed = torch.tensor(spec_map())
    assert printed.numel() == 256
    assert torch.equal(printed, printed.sort().values)
    assert torch.equal(dynamic_map(), printed)


def test_printed_dynamic_map_is_that_of_bitsandbytes() -> None:
    functional = pytest.importorskip("bitsandbytes.functional")
    assert torch.equal(functional.create_dynamic_map(signed=True), torch.tensor(spec_map()))


def test_three_bit_example_of_the_text() -> None:
    codes = torch.tensor([1, 6, 3, 7, 0, 2, 5, 4, 1], dtype=torch.uint8)
    example = re.search(r"the codes ([\d ]+) are the bytes `([0-9A-F ]+)`", SPEC)
    assert example is not None
    assert codes.tolist() == [int(code) for code in example[1].split()]
    packed = bytes.fromhex(example[2])
    assert bytes(pack_codes(codes, 3).tolist()) == packed
    assert row_values(packed, 9, 3) == codes.tolist()
