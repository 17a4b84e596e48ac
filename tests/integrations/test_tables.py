"""Embeddings and heads in 8 bits without adapters, tied and not; nothing is stored twice."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from torch import nn
from transformers import AutoModelForCausalLM

import loftq
import zoo
from loftq.nn import PackedLayer
from loftq.report.inspect import inspect_output

TABLES = {"embedding": 8, "head": 8}


def quantized(tmp_path: Path, name: str, **options: object) -> tuple[nn.Module, Path]:
    """A tiny model and its packed folder."""
    model = zoo.build(name)
    source = zoo.save(model, tmp_path / "source")
    loftq.quantize(source, tmp_path / "out", rank=4, device="cpu", **options)
    return model, tmp_path / "out"


def stored(folder: Path) -> dict[str, tuple[int, ...]]:
    """Name -> shape of every tensor of a folder's weights."""
    found = {}
    for file in folder.glob("*.safetensors"):
        with safe_open(file, framework="pt") as reader:
            found |= {k: tuple(reader.get_slice(k).get_shape()) for k in reader.keys()}  # noqa: SIM118
    return found


@pytest.mark.parametrize("method", ["loftq", "cloq"])
def test_tables_alone_are_refused(tmp_path: Path, method: str) -> None:
    source = zoo.save(zoo.build("llama"), tmp_path / "source")
    with pytest.raises(ValueError, match="lm_head would be packed without an adapter, and nothing"):
        loftq.plan(source, rank=4, device="cpu", head=8, targets=["lm_head"], method=method)


@pytest.mark.parametrize("name", ["llama", "llama-tied", "opt", "gpt2"])
def test_tables_are_stored_in_8_bits_and_load(tmp_path: Path, name: str) -> None:
    model, out = quantized(tmp_path, name, **TABLES)
    loaded = loftq.load(out).get_base_model()
    embedding, head = loaded.get_input_embeddings(), loaded.get_output_embeddings()
    assert isinstance(embedding, PackedLayer)
    assert isinstance(head, PackedLayer)
    assert str(embedding.spec) == str(head.spec) == "sint8-g64-f16"
    tied = model.get_output_embeddings().weight is model.get_input_embeddings().weight
    assert (head.weight_packed is embedding.weight_packed) == tied
    weight = model.get_input_embeddings().weight
    assert (embedding.dequantize() - weight).norm() < 0.01 * weight.norm()
    assert "embed_tokens" not in json.loads((out / "init_adapter/adapter_config.json").read_text())
    ids = zoo.tokens()
    with torch.no_grad():
        assert torch.isfinite(loaded(ids).logits).all()


def test_a_packed_head_gives_the_logits_of_its_values(tmp_path: Path) -> None:
    _, out = quantized(tmp_path, "llama-tied", **TABLES)
    model = loftq.load(out)
    ids = zoo.tokens()
    packed = model(ids).logits
    base = model.get_base_model()
    base.get_output_embeddings().dequantize_()
    torch.testing.assert_close(model(ids).logits, packed)


def test_bytes_records_and_check_count_tables(tmp_path: Path) -> None:
    _, out = quantized(tmp_path, "llama-tied", embedding=8)
    record = json.loads((out / "loftq.json").read_text())
    table = next(x for x in record["layers"] if x["name"] == "model.embed_tokens")
    assert (table["rank"], table["method"], table["kind"]) == (0, "rounding", "embedding")
    assert 0 < table["error"] == table["plain_error"] < 0.01
    assert not [k for k in record["kept"] if k["module"] == "model.embed_tokens"]
    names = stored(out)
    assert "model.embed_tokens.weight" not in names
    assert not [name for name in names if name.startswith("lm_head")]
    assert not [name for name in stored(out / "init_adapter") if "embed" in name or "head" in name]
    report = inspect_output(out, check=True, source=tmp_path / "source")
    assert report.ok, report.problems
    assert report.bytes["packed"] == record["totals"]["packed_bytes"]
    table_bytes = zoo.VOCAB * (zoo.WIDTH + 2)
    assert next(x for x in report.layers if x.module == "model.embed_tokens").packed_bytes == (
        table_bytes
    )


@pytest.mark.parametrize("name", ["llama", "llama-tied"])
def test_a_saved_copy_loads_again_and_stores_nothing_twice(tmp_path: Path, name: str) -> None:
    _, out = quantized(tmp_path, name, method="qlora", **TABLES)
    model = AutoModelForCausalLM.from_pretrained(out)
    model.save_pretrained(tmp_path / "again")
    heads = [key for key in stored(tmp_path / "again") if key.startswith("lm_head.weight_")]
    assert bool(heads) == (name == "llama")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "again")
    ids = zoo.tokens()
    with torch.no_grad():
        assert torch.equal(again(ids).logits, model(ids).logits)
    embedding, head = again.get_input_embeddings(), again.get_output_embeddings()
    assert (head.weight_packed is embedding.weight_packed) == (name == "llama-tied")


def test_ties_survive_moves_casts_and_tying_again(tmp_path: Path) -> None:
    _, out = quantized(tmp_path, "llama-tied", method="qlora", **TABLES)
    model = AutoModelForCausalLM.from_pretrained(out)
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    model.to(torch.bfloat16)
    model.tie_weights()
    assert head.weight_packed is embedding.weight_packed
    assert head.weight.dtype == embedding.weight.dtype == torch.bfloat16
    assert model(zoo.tokens()).logits.dtype == torch.bfloat16


def test_a_loaded_model_is_packed_in_memory_with_its_tie() -> None:
    model = zoo.build("llama-tied")
    wrapped = loftq.quantize_model(model, rank=4, **TABLES)
    base = wrapped.get_base_model()
    assert base.get_output_embeddings().weight_packed is base.get_input_embeddings().weight_packed
    loss = wrapped(input_ids=zoo.tokens(), labels=zoo.tokens()).loss
    loss.backward()
    trained = [name for name, p in wrapped.named_parameters() if p.grad is not None]
    assert trained
    assert not [name for name in trained if "lora_" not in name]


def test_peft_finds_no_place_on_a_packed_table_by_itself(tmp_path: Path) -> None:
    _, out = quantized(tmp_path, "llama", **TABLES)
    model = loftq.load(out, trainable=True)
    assert not [
        n for n, _ in model.named_parameters() if "lora" in n and ("head" in n or "embed" in n)
    ]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"embedding": 4}, r"embedding=4: choose 8 \(packed, without an adapter\) or 16"),
        ({"embedding": 8, "embeddings": True}, "exclude each other"),
        ({"embedding": 8, "formats": {"embed_tokens": "nf4"}}, "rounded row by row"),
        ({"embeddings": True}, r"Pack the two without one \(embedding=8\)"),
    ],
)
def test_what_cannot_be_is_refused(
    tmp_path: Path, options: dict[str, object], message: str
) -> None:
    source = zoo.save(zoo.build("llama-tied"), tmp_path / "source")
    with pytest.raises(ValueError, match=message):
        loftq.plan(source, rank=4, device="cpu", **options)


def test_tied_modules_that_scale_their_rows_are_refused(tmp_path: Path) -> None:
    source = zoo.save(zoo.build("bart"), tmp_path / "source")
    with pytest.raises(ValueError, match=r"embedding=8: no .* \(found: .*BartScaledWordEmbedding"):
        loftq.plan(source, rank=4, device="cpu", embedding=8)


@pytest.mark.parametrize(
    ("name", "key"), [("gemma2", "embedding"), ("gemma2", "head"), ("bert", "head")]
)
def test_a_table_that_cannot_be_packed_is_said(tmp_path: Path, name: str, key: str) -> None:
    source = zoo.save(zoo.build(name), tmp_path / "source")
    with pytest.raises(ValueError, match=f"{key}=8: no {key} of .* can be packed"):
        loftq.plan(source, rank=4, device="cpu", **{key: 8})


def test_large_tables_are_rounded_in_panels(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = loftq.quantize_model(zoo.build("llama"), rank=4, **TABLES).get_base_model()
    monkeypatch.setattr("loftq.pipeline.rounded.ROUNDED_AT_ONCE", zoo.WIDTH * 7)
    parts = loftq.quantize_model(zoo.build("llama"), rank=4, **TABLES).get_base_model()
    for name, tensor in whole.lm_head.components().items():
        assert torch.equal(tensor, parts.lm_head.components()[name])
