"""`best` end to end: families, order, resume, models in memory, and what it refuses."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

import loftq
import zoo
from loftq.pipeline import stream as engine
from loftq.report import inspect_output
from test_calibrated import OPTIONS, add_tokenizer, contents, place, quantize

__all__ = ["place"]


@pytest.mark.parametrize("model", ["llama", "bert", "gpt2", "t5", "opt-projected"])
def test_best_serves_every_kind_of_model(model: str, place: Path) -> None:
    zoo.save(zoo.build(model), place / model)
    add_tokenizer(place / model)
    record = quantize(place, "out", model=model, method="best", iters=1)
    for layer in record["layers"]:
        assert layer["method"] == "best"
        assert layer["tokens"] == record["calibration"]["tokens"]
    assert inspect_output(place / "out", True, place / model).problems == []
    assert not list((place / "cache").rglob("*.safetensors"))  # what is of one run alone


def test_the_first_layers_are_those_of_fast_and_later_ones_are_not(place: Path) -> None:
    fast, best = (
        {layer["name"]: layer for layer in quantize(place, name, method=name)["layers"]}
        for name in ("fast", "best")
    )
    for name in ("q_proj", "k_proj", "v_proj"):
        path = f"model.layers.0.self_attn.{name}"
        assert best[path]["errors"] == pytest.approx(fast[path]["errors"], rel=1e-3)
    path = "model.layers.1.mlp.down_proj"
    assert best[path]["errors"] != pytest.approx(fast[path]["errors"], rel=1e-3)


def outputs(model: torch.nn.Module, ids: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=ids, output_hidden_states=True).hidden_states[-1].double()


def test_in_sequence_the_model_comes_closer_to_the_original(place: Path) -> None:
    """On the tokens that were calibrated on: what a sequence is for."""
    original = zoo.build("llama")
    windows = loftq.plan(
        place / "llama", method="best", data=str(place / "some.jsonl"), **OPTIONS
    ).calibration
    assert windows is not None
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(place / "llama")
    rows = [json.loads(line)["text"] for line in (place / "some.jsonl").read_text().splitlines()]
    ids = torch.tensor(tokenizer("\n\n".join(rows))["input_ids"][: 20 * 32]).view(20, 32)
    wanted, errors = outputs(original, ids), {}
    for name in ("cloq", "fast", "best"):
        quantize(place, name, method=name)
        found = outputs(loftq.load(place / name), ids)
        errors[name] = ((found - wanted).norm() / wanted.norm()).item()
    assert errors["best"] < 0.97 * errors["fast"] < errors["cloq"]


@pytest.mark.parametrize("solved", [1, 2, 4, 6, 7])
def test_an_interrupted_run_ends_in_the_same_bytes(
    solved: int, place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    chosen = {"method": "best", "iters": 1}
    quantize(place, "whole", **chosen)
    count, real = 0, engine.solve_batch

    def interrupted(*args: object) -> object:
        nonlocal count
        count += 1
        if count > solved:
            raise KeyboardInterrupt
        return real(*args)

    monkeypatch.setattr(engine, "solve_batch", interrupted)
    with pytest.raises(KeyboardInterrupt):
        quantize(place, "resumed", **chosen)
    monkeypatch.setattr(engine, "solve_batch", real)
    quantize(place, "resumed", **chosen)
    assert contents(place / "resumed") == contents(place / "whole")


def test_a_loaded_model_gives_what_the_checkpoint_gives(place: Path) -> None:
    from transformers import AutoTokenizer

    quantize(place, "out", method="best", iters=1)
    expected = loftq.load(place / "out").state_dict()
    found = loftq.quantize_model(
        zoo.build("llama"),
        method="best",
        iters=1,
        tokenizer=AutoTokenizer.from_pretrained(place / "llama"),
        data=str(place / "some.jsonl"),
        **OPTIONS,
    ).state_dict()
    packed = [key for key in expected if "weight_packed" in key]
    assert packed
    for key in packed:
        assert torch.equal(found[key], expected[key])


def test_batches_follow_the_forward(place: Path) -> None:
    plan = loftq.plan(place / "llama", method="best", data=str(place / "some.jsonl"), **OPTIONS)
    names = [[layer.info.module.rpartition(".")[2] for layer in b.layers] for b in plan.batches]
    block = [["q_proj"], ["k_proj", "v_proj"], ["o_proj"], ["gate_proj", "up_proj"], ["down_proj"]]
    joined = [["q_proj", "k_proj", "v_proj"], *block[2:]]
    assert names in (2 * block, 2 * joined)  # as heads are grouped or not
    depths = [batch.layers[0].info.depth for batch in plan.batches]
    assert depths == sorted(depths)


def test_blocks_that_are_entered_several_times_are_refused(place: Path) -> None:
    from transformers import AlbertConfig, AlbertModel

    config = AlbertConfig(
        vocab_size=zoo.VOCAB,
        embedding_size=16,
        hidden_size=zoo.WIDTH,
        intermediate_size=zoo.ODD,
        num_hidden_layers=3,
        num_attention_heads=zoo.HEADS,
    )
    zoo.save(AlbertModel(config), place / "albert")
    add_tokenizer(place / "albert")
    with pytest.raises(ValueError, match=r"AlbertModel: enters its blocks several times.*fast"):
        quantize(place, "out", model="albert", method="best", skip=["*hidden_mapping_in", "pooler"])


def test_layers_outside_of_the_blocks_are_refused(place: Path) -> None:
    zoo.save(zoo.build("opt-projected"), place / "opt")
    add_tokenizer(place / "opt")
    with pytest.raises(ValueError, match=r"project_in: lies outside of the blocks.*skip="):
        loftq.plan(
            place / "opt",
            method="best",
            data=str(place / "some.jsonl"),
            targets=["q_proj", "project_in"],
            **OPTIONS,
        )
