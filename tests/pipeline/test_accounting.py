"""Table 7 of the paper (arXiv:2310.08659) and what a disk would say of the same models."""

import pytest

from loftq.formats import FormatSpec, parse_format
from loftq.pipeline.accounting import adapter_parameters, packed_bytes, paper_ratio, whole_model
from loftq.pipeline.layout import LayerInfo

UNIFORM2, UNIFORM4 = parse_format("uniform2"), parse_format("uniform4")
NF2, NF4 = parse_format("nf2-g64-f16"), parse_format("nf4-g64-f16")


def linear(name: str, out_features: int, in_features: int, kind: str = "linear") -> LayerInfo:
    return LayerInfo(module=name, tensor=name, shape=(out_features, in_features), kind=kind)


def blocks(name: str, count: int, shapes: list[tuple[int, int]]) -> list[LayerInfo]:
    return [linear(f"{name}.{i}.{j}", *s) for i in range(count) for j, s in enumerate(shapes)]


DEBERTA = blocks("layer", 12, [(768, 768)] * 4 + [(3072, 768), (768, 3072)])
DEBERTA_EMBEDDINGS = [linear("words", 128100, 768, "embedding")]
DEBERTA_TABLES = [linear("relative", 512, 768, "embedding")]
BART = [
    *blocks("encoder", 12, [(1024, 1024)] * 4 + [(4096, 1024), (1024, 4096)]),
    *blocks("decoder", 12, [(1024, 1024)] * 8 + [(4096, 1024), (1024, 4096)]),
]
LLAMA_7B = blocks("layers", 32, [(4096, 4096)] * 4 + [(11008, 4096)] * 2 + [(4096, 11008)])
LLAMA_13B = blocks("layers", 40, [(5120, 5120)] * 4 + [(13824, 5120)] * 2 + [(5120, 13824)])
LLAMA_7B_REST = 2 * 32000 * 4096 + 65 * 4096  # embedding, head, norms


def uniformly(layers: list[LayerInfo], spec: FormatSpec) -> dict[str, FormatSpec]:
    return {layer.module: spec for layer in layers}


@pytest.mark.parametrize(
    ("layers", "spec", "rank", "compression", "trainable"),
    [
        (DEBERTA, UNIFORM2, 16, 15.6, 3.1),
        (DEBERTA, UNIFORM2, 32, 18.8, 6.3),
        (DEBERTA, NF2, 16, 17.2, 3.1),
        (DEBERTA, NF2, 32, 20.4, 6.3),
        (BART, NF2, 8, 15.3, 1.2),
        (BART, NF2, 16, 16.7, 2.5),
        (BART, NF4, 8, 27.8, 1.2),
        (BART, NF4, 16, 29.0, 2.5),
        (BART, UNIFORM4, 8, 26.2, 1.2),
        (BART, UNIFORM4, 16, 27.5, 2.5),
        (LLAMA_7B, NF2, 64, 16.6, 2.4),
        (LLAMA_7B, NF4, 64, 29.0, 2.4),
        (LLAMA_13B, NF2, 64, 16.0, 1.9),
        (LLAMA_13B, NF4, 64, 28.5, 1.9),
    ],
)
def test_every_row_of_table_7(layers, spec, rank, compression, trainable):
    ratio = paper_ratio(layers, uniformly(layers, spec), rank)
    assert 100 * ratio.compression == pytest.approx(compression, abs=0.2)
    assert 100 * ratio.trainable == pytest.approx(trainable, abs=0.1)


def test_the_papers_deberta_rows_leave_the_embeddings_out():
    ratio = paper_ratio(DEBERTA, uniformly(DEBERTA, UNIFORM2), 16)
    assert 100 * ratio.compression == pytest.approx(15.625, abs=0.001)
    everything = DEBERTA + DEBERTA_EMBEDDINGS + DEBERTA_TABLES
    ratio = paper_ratio(everything, uniformly(everything, UNIFORM2), 16)
    assert 100 * ratio.compression == pytest.approx(15.08, abs=0.02)
    assert 100 * ratio.trainable == pytest.approx(2.58, abs=0.02)


@pytest.mark.parametrize(
    ("name", "percent"),
    [
        ("nf2-g64-f16", 19.8),
        ("nf2-g64-dq", 19.0),
        ("nf4-g64-f16", 31.8),
        ("nf4-g64-dq", 31.1),
    ],
)
def test_the_whole_llama_7b_is_larger_than_the_papers_ratio(name, percent):
    spec = parse_format(name)
    whole = whole_model(
        LLAMA_7B,
        uniformly(LLAMA_7B, spec),
        64,
        rest_parameters=LLAMA_7B_REST,
        adapter_itemsize=2,
    )
    assert 100 * whole.ratio == pytest.approx(percent, abs=0.1)
    ratio = paper_ratio(LLAMA_7B, uniformly(LLAMA_7B, spec), 64)
    assert whole.ratio > ratio.compression + 0.02


def test_float32_scales_give_the_size_of_the_published_4_bit_backbone():
    spec = parse_format("nf4-g64-f32")
    whole = whole_model(LLAMA_7B, uniformly(LLAMA_7B, spec), 0, rest_parameters=LLAMA_7B_REST)
    assert whole.adapter_bytes == 0
    assert whole.total_bytes == pytest.approx(4.17e9, rel=2e-3)


def test_whole_deberta_with_16_bit_embeddings_is_over_half():
    rest = 128100 * 768 + 512 * 768 + 1_000_000
    whole = whole_model(DEBERTA, uniformly(DEBERTA, UNIFORM2), 16, rest_parameters=rest)
    assert whole.total_bytes == whole.packed_bytes + whole.rest_bytes + whole.adapter_bytes
    assert whole.ratio > 0.6


def test_adapters_count_at_their_itemsize():
    layer = linear("q", 6, 4)
    assert adapter_parameters(layer, 3) == 30
    spec = uniformly([layer], NF4)
    two = whole_model([layer], spec, 3, rest_parameters=0, adapter_itemsize=2)
    four = whole_model([layer], spec, 3, rest_parameters=0)
    assert (two.adapter_bytes, four.adapter_bytes) == (60, 120)


@pytest.mark.parametrize("name", ["nf2", "nf3-g32", "nf4-channel-bf16", "int3-g64-f16", "uniform2"])
@pytest.mark.parametrize("shape", [(1, 1), (7, 75), (64, 64), (37, 4097)])
def test_packed_bytes_are_bits_per_weight(name, shape):
    spec = parse_format(name)
    stored = packed_bytes(linear("w", *shape), spec)
    assert stored * 8 == pytest.approx(spec.bits_per_weight(*shape) * shape[0] * shape[1])
