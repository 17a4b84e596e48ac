"""Rotated inputs end to end: what is stored, what runs it, what is chosen, and who refuses it."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

import loftq
import zoo
from loftq.formats import parse_format
from loftq.integrations.fused_step import why_not_fused
from loftq.integrations.inference import prepare_for_inference
from loftq.integrations.llama_like import NotReadable, read_model
from loftq.integrations.training import fuse_for_training
from loftq.methods.rival import left_over
from loftq.nn import packed_layers
from loftq.pipeline import stream as engine
from loftq.pipeline.config import QuantizeConfig
from loftq.pipeline.serving import where_served
from loftq.report import inspect_output
from loftq.transforms import rotated
from test_calibrated import OPTIONS, contents, place, quantize
from tolerances import MERGE_LOGITS

__all__ = ["place"]
ODD = ("down_proj",)
"""75 inputs in the zoo: no block fills them."""


def formats(record: dict) -> dict[str, str]:
    return {layer["name"]: layer["format"] for layer in record["layers"]}


def left(layer: dict) -> float:
    """`left_over` of a record that was read back."""
    from loftq.methods import LayerRecord

    return left_over(LayerRecord(**{k: v for k, v in layer.items() if k not in
                                    ("tensor", "kind", "shape")}))  # fmt: skip


@pytest.mark.parametrize("method", ["loftq", "qlora", "lqer", "cloq", "fast", "srr"])
def test_auto_keeps_the_better_of_both_for_each_layer(method: str, place: Path) -> None:
    options: dict[str, Any] = {"method": method, "skip": ODD}
    none, every, auto = (
        {
            layer["name"]: layer
            for layer in quantize(place, name, rotation=name, **options)["layers"]
        }
        for name in ("none", "all", "auto")
    )
    for name, layer in auto.items():
        assert none[name]["format"] == "int2-g32-dq"
        assert every[name]["format"] == "int2-g32-dq-h16"
        better = every if left(every[name]) < left(none[name]) else none
        assert layer["format"] == better[name]["format"]
        assert left(layer) == left(better[name])
        other = none if better is every else every
        assert layer["rival"] == other[name]["format"]
        assert layer["rival_error"] == left(other[name])
        assert layer["notes"] == better[name]["notes"]
    for name in ("all", "auto"):
        assert inspect_output(place / name, True, place / "llama").problems == []
    listed = json.loads((place / "auto" / "config.json").read_text())["quantization_config"]
    assert {path: entry["format"] for path, entry in listed["layers"].items()} == {
        name: layer["format"] for name, layer in auto.items()
    }


def test_a_loaded_model_computes_with_the_weights_that_its_records_tell_of(place: Path) -> None:
    quantize(place, "out", method="fast", rotation="all", skip=ODD)
    model = loftq.load(place / "out")
    base = model.get_base_model()
    original = zoo.build("llama")
    record = json.loads((place / "out" / "loftq.json").read_text())
    for layer in record["layers"]:
        adapted = base.get_submodule(layer["name"])
        W = original.get_submodule(layer["name"]).weight.detach()
        product = adapted.lora_B["default"].weight @ adapted.lora_A["default"].weight
        now = adapted.base_layer.dequantize(torch.float32) + adapted.scaling["default"] * product
        error = torch.linalg.vector_norm(W - now) / torch.linalg.vector_norm(W)
        assert float(error) == pytest.approx(layer["error"], rel=1e-4)
    with torch.no_grad():
        wanted = model(input_ids=zoo.tokens()).logits
        merged = model.merge_and_unload()
        assert not packed_layers(merged)
        assert (merged(input_ids=zoo.tokens()).logits - wanted).abs().max() <= MERGE_LOGITS


def test_a_table_or_an_odd_width_is_left_by_auto_and_refused_by_all(place: Path) -> None:
    record = quantize(place, "out", method="loftq", rotation="auto")
    odd = {name: kind for name, kind in formats(record).items() if name.endswith("down_proj")}
    assert set(odd.values()) == {"int2-g32-dq"}
    with pytest.raises(
        ValueError, match=r"down_proj: rotation=all: 75 inputs are not whole blocks"
    ):
        quantize(place, "refused", method="loftq", rotation="all")
    with pytest.raises(
        ValueError, match=r"q_proj: .* rotates blocks of 64 inputs, and of 48, 16 fit"
    ):
        quantize(place, "refused", method="loftq", format="nf4-g64-dq-h64")
    table = quantize(place, "table", method="loftq", rotation="auto", embedding=8)
    assert formats(table)["model.embed_tokens"] == "sint8-g64-f16"


def test_a_named_block_is_kept_and_a_weight_with_one_scale_is_not_rotated(place: Path) -> None:
    options: dict[str, Any] = {"method": "loftq", "skip": ODD}
    named = {"*.q_proj": "int2-g16-dq-h16", "*.k_proj": "uniform2"}
    for layer, form in formats(
        quantize(place, "auto", rotation="auto", formats=named, **options)
    ).items():
        if layer.endswith("q_proj"):
            assert form == "int2-g16-dq-h16"
        if layer.endswith("k_proj"):
            assert form == "uniform2-tensor-f32"
    with pytest.raises(ValueError, match=r"k_proj: rotation=all: uniform2-tensor-f32 is stored un"):
        quantize(place, "refused", rotation="all", formats=named, **options)
    with pytest.raises(ValueError, match=r"uniform2-tensor-f32-h16: .* such as int2-g64-dq-h16"):
        quantize(place, "refused", format="uniform2-tensor-f32-h16", **options)
    assert rotated(parse_format("nf2-g64-dq-h16"), 576).rotation == 16


@pytest.mark.parametrize("option", [{"rotation": "all", "engine": "vllm"}, {"rotation": "some"}])
def test_choices_that_cannot_be_are_refused(option: dict) -> None:
    with pytest.raises(ValueError, match=r"turns the inputs|rotation='some' does not exist"):
        QuantizeConfig(**option)


def test_in_sequence_a_resume_reads_back_the_format_that_was_kept(
    place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options: dict[str, Any] = {"method": "best", "iters": 1, "rotation": "auto"}
    whole = formats(quantize(place, "whole", **options))
    assert len({name for name in whole.values() if name.endswith("-h16")}) == 1
    solved, real = [], engine.solve_batch

    def interrupted(*args: Any) -> Any:
        if len(solved) == 4:
            raise KeyboardInterrupt
        solved.append(1)
        return real(*args)

    monkeypatch.setattr(engine, "solve_batch", interrupted)
    with pytest.raises(KeyboardInterrupt):
        quantize(place, "again", **options)
    monkeypatch.setattr(engine, "solve_batch", real)
    assert formats(quantize(place, "again", **options)) == whole
    assert contents(place / "again") == contents(place / "whole")


def packed(rotation: str = "auto") -> Any:
    """A tiny model of which some layers are rotated, with adapters that do something."""
    torch.manual_seed(0)
    model = loftq.quantize_model(
        zoo.build("llama"), rank=4, method="qlora", bits=2, rotation=rotation, skip=ODD
    )
    for path, parameter in model.named_parameters():
        if "lora_B" in path:
            parameter.data.normal_(0, 0.1)
    return model


def gradients(model: Any) -> dict[str, torch.Tensor]:
    model.zero_grad()
    ids = zoo.tokens()
    model(input_ids=ids, labels=ids).loss.backward()
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("rotation", ["all", "auto"])
def test_the_training_layer_gives_the_gradients_of_the_stock_path(rotation: str) -> None:
    model = packed(rotation).train()
    blocks = {layer.spec.rotation for layer in packed_layers(model).values()}
    assert blocks == ({16} if rotation == "all" else {0, 16})
    wanted = gradients(model)
    assert not fuse_for_training(model).left
    found = gradients(model)
    assert found.keys() == wanted.keys()
    for name, grad in found.items():
        size = wanted[name].abs().max()
        torch.testing.assert_close(grad, wanted[name], rtol=0, atol=1e-5 * float(size))


def test_what_reads_the_bytes_itself_leaves_rotated_layers_to_peft() -> None:
    model = packed("auto").eval()
    turned = [path for path, layer in packed_layers(model).items() if layer.spec.rotation]
    with torch.no_grad():
        wanted = model(input_ids=zoo.tokens()).logits
    done = prepare_for_inference(model)
    assert {path.removesuffix(".base_layer") for path in turned} == set(done.left)
    assert set(done.left.values()) == {"its inputs are rotated in blocks of 16 first"}
    with torch.no_grad():
        assert (model(input_ids=zoo.tokens()).logits - wanted).abs().max() <= MERGE_LOGITS
    with pytest.raises(NotReadable, match="q_proj: its inputs are rotated"):
        read_model(packed("all").eval(), capacity=8)
    config = LlamaConfig(
        vocab_size=101, hidden_size=64, num_attention_heads=2, num_key_value_heads=1,
        num_hidden_layers=1, intermediate_size=96,
    )  # fmt: skip
    for rotation, wanted_reason in (
        ("none", ""),
        ("all", "its inputs are rotated in blocks of 64"),
    ):
        model = loftq.quantize_model(
            LlamaForCausalLM(copy.deepcopy(config)), rank=4, rotation=rotation
        )
        assert wanted_reason in why_not_fused(model)
        assert bool(why_not_fused(model)) == bool(wanted_reason)


def test_only_dense_and_lora_exports_hold_a_rotated_weight(place: Path) -> None:
    quantize(place, "out", method="loftq", format="sint4-g32-f16", rotation="all", skip=ODD)
    plan = loftq.plan(place / "llama", format="sint4-g32-f16", rotation="auto", skip=ODD)
    others = [row for row in where_served(plan) if "transformers +" not in row.engine]
    assert others
    assert not any(row.exact for row in others)
    with pytest.raises(ValueError, match="inputs are rotated"):
        loftq.export(place / "out", to="gptq", output=place / "engine")
    loftq.export(place / "out", to="dense", output=place / "dense")
    model = loftq.load(place / "out")
    dense = AutoModelForCausalLM.from_pretrained(place / "dense", dtype=torch.float32)
    with torch.no_grad():
        gap = dense(input_ids=zoo.tokens()).logits - model(input_ids=zoo.tokens()).logits
    assert gap.abs().max() <= MERGE_LOGITS
    assert isinstance(model, PeftModel)


def test_planted_outliers_of_the_inputs_are_what_auto_rotates_for(place: Path) -> None:
    """One large column in every group of one layer's weight, normal weights elsewhere."""
    model = zoo.build("llama")
    path = "model.layers.1.self_attn.o_proj"
    with torch.no_grad():
        for layer in packed_layers(packed("none")):
            name = layer.removesuffix(".base_layer").removeprefix("base_model.model.")
            model.get_submodule(name).weight.normal_(0, 0.02)
        model.get_submodule(path).weight[:, ::16] *= 30
    zoo.save(model, place / "planted")
    options: dict[str, Any] = {**OPTIONS, "format": "snf3-g16-f32", "scale_fit": "absmax"}
    loftq.quantize(place / "planted", place / "out", method="qlora", rotation="auto", **options)
    record = json.loads((place / "out" / "loftq.json").read_text())
    assert formats(record)[path] == "snf3-g16-f32-h16"
