"""The CPU library on 64-bit Arm, emulated: NEON and plain C++ against the reference.

pytest -m slow tests/ops/test_cpu_on_arm.py
"""

import pytest
import torch

from cpu_on_arm import Image, build_replay, why_not
from loftq.formats import parse_format
from loftq.formats.grids import SEARCH, grid_of
from loftq.formats.packing import pack_codes
from loftq.ops.columns import LEAST_SCALE, nearest
from loftq.ops.cpu.decoder import BlockTensors, Linear, ModelTensors, TokenStep
from loftq.ops.cpu.library import (
    DTYPES,
    ISAS,
    Adapter,
    Grid,
    Projection,
    Team,
    make_weight,
)
from loftq.ops.reference import dequantize_reference, dynamic_map_on
from loftq.ops.scale_search import fit_scales_reference
from packed_folder import random_quantized
from tolerances import FLOAT32_ROUNDING, KERNEL_ERROR_RATIO, STEP_LOGITS

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(bool(why_not()), reason=why_not()),
]
FORMATS = (
    "nf4", "nf3", "nf2", "nf4-g16-f16", "nf3-g128-bf16", "nf2-g256-f32", "snf3-channel-f32",
    "iq4nl", "int4-g32", "int3", "int2-g16", "int3-channel-bf16", "sint4-g128-f16", "sint8",
    "int8-g32-f16",
)  # fmt: skip
SHAPES = ((33, 256, 3), (17, 37, 1), (5, 1, 2), (20, 63, 9), (2, 4097, 7))
"""Rows, columns, tokens."""
GRIDS = ("nf4", "nf3", "nf2", "iq4nl", "sint4", "int2", "int3", "int4", "int8")


@pytest.fixture(scope="module")
def replay(tmp_path_factory):
    """Runs an image."""
    folder = tmp_path_factory.mktemp("arm")
    program = build_replay(folder)
    return lambda image: image.run(program, folder)


@pytest.fixture(params=["scalar", "neon"])
def team(request):
    """One thread with these instructions."""
    return Team(ISAS.index(request.param), 1, None)


def packed(image, name, rows, columns):
    """(structure within the image, arguments of the reference) of a random weight."""
    spec, q = parse_format(name), random_quantized(rows, columns, name)
    stored = (q.weight_packed, q.weight_scale, q.weight_zero, q.weight_nested)
    layout = (spec.bits, spec.group_size, spec.scale_coding, spec.levels, spec.default_zero)
    parts = [None if part is None else image.put(part, offset=1) for part in stored]
    parts.append(image.put(dynamic_map_on(torch.device("cpu"))))
    pointers = [None if part is None else part.data_ptr() for part in parts]
    return make_weight(pointers, (rows, columns), *layout), (*stored, columns, *layout)


def poison(image, *shape, dtype=torch.float32):
    return image.put(torch.full(shape, torch.nan, dtype=dtype))


@pytest.mark.parametrize("name", FORMATS)
def test_weights_are_those_of_the_reference_to_the_bit(replay, team, name):
    image, pairs = Image(), []
    for rows, columns, _ in SHAPES:
        weight, arguments = packed(image, name, rows, columns)
        for dtype, number in DTYPES.items():
            found = poison(image, rows, columns, dtype=dtype)
            image.call("dequantize", team, weight, number, found)
            pairs.append((found, dequantize_reference(*arguments, dtype)))
    replay(image)
    for found, wanted in pairs:
        assert torch.equal(found, wanted), (found.shape, found.dtype)


@pytest.mark.parametrize("name", FORMATS)
def test_products_are_as_exact_as_the_dense_one(replay, team, name, generator):
    image, found = Image(), []
    for rows, columns, tokens in SHAPES:
        weight, arguments = packed(image, name, rows, columns)
        W = dequantize_reference(*arguments, torch.float32)
        for dtype, number in DTYPES.items():
            x = torch.randn(tokens, columns, generator=generator).to(dtype)
            A, B = (
                torch.randn(s, generator=generator).to(dtype) for s in ((5, columns), (rows, 5))
            )
            places = [image.put(part).data_ptr() for part in (A, B)]
            projection = Projection(weight, Adapter(*places, 5, number, 0.5), None, 0)
            y = poison(image, tokens, rows, dtype=dtype)
            image.call("project", team, projection, 1, image.put(x), tokens, number, y)
            found.append((x, W, A, B, y))
    replay(image)
    for x, W, A, B, y in found:
        exact = x.double() @ W.double().T + 0.5 * (x.double() @ A.double().T) @ B.double().T
        plain = x @ W.to(x.dtype).T + 0.5 * (x @ A.T) @ B.T
        allowed = KERNEL_ERROR_RATIO * (plain.double() - exact).norm()
        floor = FLOAT32_ROUNDING * exact.norm() if x.dtype is torch.float32 else 0.0
        assert (y.double() - exact).norm() <= max(allowed, floor), (W.shape, x.dtype)


@pytest.mark.parametrize("name", GRIDS)
def test_rounding_is_that_of_the_reference_to_the_bit(replay, team, name, generator):
    grid = grid_of(parse_format(name))
    levels, top, ratios = grid.codebook(torch.device("cpu")), grid.top, SEARCH[grid.bits]
    image, pairs = Image(), []
    tried = image.put(torch.tensor(ratios))
    book = None if levels is None else image.put(levels).data_ptr()
    for columns in (1, 16, 37, 64, 1025):
        x = torch.randn(23, columns, generator=generator)
        x[0] = 0
        place = image.put(x)
        for count in (0, len(ratios)):
            layout = Grid(book, tried.data_ptr(), columns, top, count, grid.shifts, LEAST_SCALE)
            scales, zeros = poison(image, 23), poison(image, 23)
            codes, values = (
                image.put(torch.zeros(23, columns, dtype=torch.uint8)),
                poison(image, 23, columns),
            )
            bytes_ = image.put(torch.zeros_like(pack_codes(codes, grid.bits)))
            image.call("fit", team, layout, place, 23, scales, zeros)
            image.call("round", team, layout, place, 23, scales, zeros, codes, values)
            image.call("pack", team, codes, 23, columns, grid.bits, bytes_)
            scale, zero = fit_scales_reference(
                x, levels, ratios[:count], top=top, shifts=grid.shifts
            )
            spread = None if zero is None else zero[:, None]
            code, value = nearest(x, scale[:, None], spread, levels, top)
            pairs += [(scales, scale), (codes, code), (values, value)]
            pairs.append((bytes_, pack_codes(code, grid.bits)))
            if zero is not None:
                pairs.append((zeros, zero))
    replay(image)
    for found, wanted in pairs:
        assert torch.equal(found, wanted), found.shape


def test_a_weight_that_is_no_number_gives_a_scale_that_is_none(replay, team):
    image, levels = Image(), grid_of(parse_format("nf4")).codebook(torch.device("cpu"))
    x = torch.ones(3, 40)
    x[1, 38] = torch.nan
    grid = Grid(
        image.put(levels).data_ptr(), image.put(torch.ones(1)).data_ptr(), 40, 15, 1, 1, LEAST_SCALE
    )
    scales = poison(image, 3)
    image.call("fit", team, grid, image.put(x), 3, scales, None)
    replay(image)
    assert scales.isnan().tolist() == [False, True, False]


HIDDEN, HEADS, KV_HEADS, HEAD_SIZE, NEURONS, VOCABULARY, CAPACITY = 36, 4, 2, 22, 50, 30, 6


def tiny_model(generator, put):
    """Two packed blocks with adapters and norms of their heads, and a dense head."""

    def random(*shape):
        return torch.randn(shape, generator=generator)

    def linear(rows, columns, name, dtype):
        q, spec = random_quantized(rows, columns, name), parse_format(name)
        layout = (spec.bits, spec.group_size, spec.scale_coding, spec.levels, spec.default_zero)
        A, B = put(random(3, columns).to(dtype)), put(random(rows, 3).to(dtype))
        parts = [put(q.weight_packed), put(q.weight_scale), None, None]
        return Linear(parts=parts, in_features=columns, layout=layout, adapter=(A, B, 0.1))

    queries, pairs = HEADS * HEAD_SIZE, KV_HEADS * HEAD_SIZE
    shapes = [(queries, HIDDEN), (pairs, HIDDEN), (pairs, HIDDEN), (HIDDEN, queries)]
    shapes += [(NEURONS, HIDDEN), (NEURONS, HIDDEN), (HIDDEN, NEURONS)]
    blocks = []
    for name, dtype in (("nf4-g16-f16", torch.bfloat16), ("nf3-g32-f32", torch.float16)):
        norms = [put(1 + random(size) / 8) for size in (HIDDEN, HIDDEN, HEAD_SIZE, HEAD_SIZE)]
        linears = [linear(*shape, name, dtype) for shape in shapes]
        blocks.append(
            BlockTensors(
                attention_norm=norms[0],
                mlp_norm=norms[1],
                head_norms=(norms[2], norms[3]),
                linears=linears,
            )
        )
    angle = random(CAPACITY, HEAD_SIZE)
    head = Linear(parts=[put(random(VOCABULARY, HIDDEN) / 6)], in_features=HIDDEN, layout=None)
    return ModelTensors(
        blocks=blocks, norm=put(torch.ones(HIDDEN)), head=head, cosine=put(angle.cos()),
        sine=put(angle.sin()), epsilon=1e-5, scaling=HEAD_SIZE**-0.5,
    )  # fmt: skip


def test_a_step_is_that_of_this_machine(replay, team, library, generator):
    image, room = Image(), (2, KV_HEADS, CAPACITY, HEAD_SIZE)
    model = tiny_model(generator, image.put)
    here = TokenStep(model, torch.zeros(room), torch.zeros(room))
    there = TokenStep(model, image.put(torch.zeros(room)), image.put(torch.zeros(room)))
    there._decoder.blocks = image.address(there._blocks)
    pairs = []
    for position in range(CAPACITY):
        x, logits = torch.randn(HIDDEN, generator=generator), poison(image, VOCABULARY)
        image.call("step", team, there._decoder, position, image.put(x), logits)
        pairs.append((logits, here(x, position)))
    replay(image)
    for logits, wanted in pairs:
        assert (logits - wanted).abs().max() <= STEP_LOGITS
