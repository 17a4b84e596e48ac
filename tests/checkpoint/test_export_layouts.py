"""Layouts of other engines: our weights, as their own readers see them, bit for bit."""

from __future__ import annotations

import json

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from loftq.checkpoint.export import (
    LAYOUTS,
    BitsAndBytes,
    CompressedTensors,
    Gguf,
    Gptq,
    Layout,
    Packed,
    first_obstacle,
)
from loftq.checkpoint.export.bnb import STATE
from loftq.checkpoint.export.words import pack_words, unpack_words
from loftq.checkpoint.header import DTYPES
from loftq.formats import QuantizedTensor, parse_format
from packed_folder import random_quantized

CASES: list[tuple[Layout, str, tuple[int, int]]] = [
    *[(BitsAndBytes(), name, (6, 256)) for name in ("nf4-g64-dq", "nf4-g128-f32", "nf4-g256-dq")],
    *[
        (layout, f"sint{bits}-{group}-f16", (64, 128))
        for layout in (Gptq(), CompressedTensors())
        for bits in (2, 3, 4, 8)
        for group in ("g32", "g64", "channel")
    ],
    (CompressedTensors(), "sint4-g64-bf16", (3, 128)),
    (CompressedTensors(), "sint3-channel-f16", (5, 37)),
    *[(Gguf(), name, (5, 96)) for name in ("sint4-g32-f16", "iq4nl-g32-f16", "sint8-g32-f16")],
]


def label(part: object) -> str:
    """How a part of a case reads in the test's name."""
    return str(getattr(part, "name", part)).replace(" ", "")


def packed(name: str, shape: tuple[int, int]) -> tuple[Packed, QuantizedTensor]:
    """A random weight in a format, as a layout is given it."""
    weight = Packed(module="m.up", stem="m.up", spec=parse_format(name), shape=shape)
    return weight, random_quantized(*shape, name, seed=sum(shape))


@pytest.mark.parametrize(("layout", "name", "shape"), CASES, ids=label)
def test_what_is_packed_stands_for_the_same_weights(
    layout: Layout, name: str, shape: tuple[int, int]
) -> None:
    weight, stored = packed(name, shape)
    assert layout.obstacle(weight) == ""
    tensors = layout.pack(weight, stored)
    planned = {spec.name: (DTYPES[spec.dtype], spec.shape) for spec in layout.tensors(weight)}
    assert planned == {key: (t.dtype, tuple(t.shape)) for key, t in tensors.items()}
    assert torch.equal(layout.unpack(weight, tensors), stored.dequantize())


@pytest.mark.parametrize(("layout", "name", "shape"), CASES, ids=label)
def test_unpacking_sees_one_wrong_bit(layout: Layout, name: str, shape: tuple[int, int]) -> None:
    weight, stored = packed(name, shape)
    tensors = layout.pack(weight, stored)
    codes = next(iter(tensors))
    tensors[codes] = tensors[codes].clone()
    tensors[codes].view(torch.uint8).flatten()[0] ^= 1
    assert not torch.equal(layout.unpack(weight, tensors), stored.dequantize())


@settings(max_examples=60, deadline=None)
@given(st.sampled_from([2, 3, 4, 8]), st.integers(1, 5), st.integers(1, 70), st.integers(0, 99))
def test_words_hold_the_codes_as_one_stream_of_bits(
    bits: int, rows: int, columns: int, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(2**bits, (rows, columns), generator=generator).to(torch.uint8)
    words = pack_words(codes, bits)
    assert words.shape == (rows, -(-columns * bits // 32))
    for row in range(rows):  # independently, as one long integer
        stream = sum(int(code) << (k * bits) for k, code in enumerate(codes[row]))
        joined = sum((int(word) % 2**32) << (32 * k) for k, word in enumerate(words[row]))
        assert joined == stream
    assert torch.equal(unpack_words(words, bits, columns), codes)


@pytest.mark.parametrize("name", ["nf4-g64-dq", "nf4-g128-dq", "nf4-g64-f32"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_bitsandbytes_reads_the_same_weights(name: str, dtype: str) -> None:
    functional = pytest.importorskip("bitsandbytes.functional", reason="bitsandbytes: dev extra")
    weight, stored = packed(name, (48, 256))
    tensors = BitsAndBytes(dtype).pack(weight, stored)
    codes = tensors.pop("m.up.weight")
    state = functional.QuantState.from_dict(
        {key.removeprefix("m.up.weight."): t for key, t in tensors.items()}, torch.device("cpu")
    )
    values = functional.dequantize_4bit(codes, state)
    assert values.dtype == getattr(torch, dtype)
    assert torch.equal(values, stored.dequantize(values.dtype))


@pytest.mark.parametrize("nested", [True, False])
def test_bitsandbytes_writes_the_same_bytes(nested: bool, generator: torch.Generator) -> None:
    functional = pytest.importorskip("bitsandbytes.functional", reason="bitsandbytes: dev extra")
    from packed_folder import quantize

    W = torch.randn(32, 256, generator=generator)
    name = f"nf4-g64-{'dq' if nested else 'f32'}"
    weight = Packed(module="w", stem="w", spec=parse_format(name), shape=(32, 256))
    ours = BitsAndBytes().pack(weight, quantize(W, name))
    codes, state = functional.quantize_4bit(
        W, blocksize=64, quant_type="nf4", compress_statistics=nested
    )
    theirs = {f"w.weight.{key}": t for key, t in state.as_dict(packed=True).items()}
    for key in ("w.weight.absmax", "w.weight.quant_map", *["w.weight.nested_absmax"] * nested):
        assert torch.equal(ours[key], theirs[key]), key
    found, wanted = (json.loads(bytes(t[f"w.{STATE}"].tolist())) for t in (ours, theirs))
    assert found.keys() == wanted.keys()
    # Not nested, both choose codes for the same scales; nested, ours for the coded scale.
    if not nested:
        assert torch.equal(ours["w.weight"], codes)
        assert found == wanted


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("columns", [64, 70])
def test_compressed_tensors_unpacks_the_same_codes(bits: int, columns: int) -> None:
    helpers = pytest.importorskip(
        "compressed_tensors.compressors.pack_quantized.helpers",
        reason="pip install compressed-tensors",
    )
    name = f"sint{bits}-channel-f16"
    weight, stored = packed(name, (5, columns))
    tensors = CompressedTensors().pack(weight, stored)
    codes = helpers.unpack_from_int32(
        tensors["m.up.weight_packed"], bits, torch.Size(tensors["m.up.weight_shape"].tolist())
    )
    values = codes.float() * tensors["m.up.weight_scale"].float()
    assert torch.equal(values, stored.dequantize())


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_gptq_is_what_its_formula_says(bits: int) -> None:
    weight, stored = packed(f"sint{bits}-g32-f16", (32, 64))
    t = Gptq().pack(weight, stored)

    def value(words: Tensor, k: int) -> int:  # number k of a stream that runs down `words`
        stream = sum((int(word) % 2**32) << (32 * i) for i, word in enumerate(words))
        return stream >> (k * bits) & (2**bits - 1)

    wanted = stored.dequantize()
    for i, j in ((0, 0), (10, 3), (11, 31), (42, 17), (63, 31)):
        group = int(t["m.up.g_idx"][i])
        zero = value(t["m.up.qzeros"][group], j) + 1  # format v1 stores the zero less one
        code = value(t["m.up.qweight"][:, j], i)
        assert float(t["m.up.scales"][group, j]) * (code - zero) == wanted[j, i].item()


@pytest.mark.parametrize(
    ("name", "kind"),
    [("sint4-g32-f16", "Q4_0"), ("iq4nl-g32-f16", "IQ4_NL"), ("sint8-g32-f16", "Q8_0")],
)
def test_gguf_dequantizes_to_the_same_weights(name: str, kind: str) -> None:
    gguf = pytest.importorskip("gguf", reason="gguf: dev extra")
    weight, stored = packed(name, (7, 96))
    blocks = Gguf().pack(weight, stored)["m.up.weight"]
    values = gguf.dequantize(blocks.numpy(), gguf.GGMLQuantizationType[kind])
    assert torch.equal(torch.from_numpy(values), stored.dequantize())


@pytest.mark.parametrize("shape", [(8, 64), (33, 96)])
def test_gguf_bytes_are_those_of_its_own_quantizer_for_its_own_values(
    shape: tuple[int, int],
) -> None:
    # Q8_0 of values that lie on its grid is a fixed point of gguf's quantizer.
    gguf = pytest.importorskip("gguf", reason="gguf: dev extra")
    generator = torch.Generator().manual_seed(1)
    codes = torch.randint(1, 256, shape, generator=generator).to(torch.uint8)
    codes[:, ::32] = 255  # the largest magnitude of each block is 127 scales
    spec = parse_format("sint8-g32-f16")
    scales = torch.rand(shape[0], shape[1] // 32, generator=generator).half().float() + 0.5
    stored = QuantizedTensor.from_codes(spec, codes, scales, None)
    weight = Packed(module="w", stem="w", spec=spec, shape=shape)
    theirs = gguf.quantize(stored.dequantize().numpy(), gguf.GGMLQuantizationType.Q8_0)
    assert torch.equal(Gguf().pack(weight, stored)["w.weight"], torch.from_numpy(theirs))


@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: layout.name)
def test_the_first_layer_that_does_not_fit_is_named(layout: Layout) -> None:
    good = next(name for own, name, _ in CASES if own.name == layout.name)
    weights = [
        Packed(module=f"layers.{i}", stem=f"layers.{i}", spec=parse_format(name), shape=(64, 256))
        for i, name in enumerate([good, "nf2-g64-dq", "nf3-g64-dq"])
    ]
    assert first_obstacle(layout, weights[:1]) == ""
    assert first_obstacle(layout, weights).startswith("layers.1 (nf2-g64-dq): ")


def test_mixed_widths_are_told_layer_by_layer() -> None:
    weights = [
        Packed(module=f"b.{i}.up", stem="", spec=parse_format(name), shape=(64, 64))
        for i, name in enumerate(["sint4-g64-f16", "sint4-g64-f16", "sint2-channel-f16"])
    ]
    gptq = Gptq().config(weights, ["lm_head"])
    assert (gptq["bits"], gptq["group_size"], gptq["sym"]) == (4, 64, True)
    assert gptq["dynamic"] == {
        r"+:^b\.2\.up$": {"bits": 2, "group_size": -1},
        "-:^lm_head$": {},
    }
    groups = CompressedTensors().config(weights, ["lm_head"])["config_groups"]
    targets = {g["weights"]["num_bits"]: g["targets"] for g in groups.values()}
    assert targets == {4: ["b.0.up", "b.1.up"], 2: ["b.2.up"]}
    strategies = {g["weights"]["num_bits"]: g["weights"]["strategy"] for g in groups.values()}
    assert strategies == {4: "group", 2: "channel"}
