"""Dry runs: models that are not there, planned at full size from their architecture."""

from math import prod
from pathlib import Path

import pytest

import loftq
import zoo
from loftq.lab.compare.planned import HEADERS_ONLY, plan_comparison
from loftq.lab.compare.recipe import known_recipes, load_recipe
from loftq.lab.compare.standin import full_size, tiny

LLAMA_7B = load_recipe("llama2-7b-nf")


def test_a_model_of_headers_plans_as_the_real_one_and_takes_no_disk(tmp_path: Path) -> None:
    folder = full_size(LLAMA_7B.architecture, tmp_path)
    plan = loftq.plan(folder, bits=2, rank=64, device="cpu")
    assert plan.weights == 32 * (4 * 4096**2 + 3 * 4096 * 11008)
    assert plan.source_bytes == 2 * 6_738_415_616  # as the hub says
    assert sum(path.stat().st_blocks for path in folder.iterdir()) * 512 < 1_000_000


def test_headers_have_the_tensors_that_a_saved_model_has(tmp_path: Path) -> None:
    real = zoo.save(zoo.build("llama-tied").bfloat16(), tmp_path / "real")
    config = zoo.ZOO["llama-tied"].config().to_dict()
    standin = full_size(config | {"architectures": ["LlamaForCausalLM"]}, tmp_path / "standin")
    ours, theirs = (loftq.plan(folder, rank=4, device="cpu") for folder in (standin, real))
    assert {s.name: s.shape for s in ours.copied} == {s.name: s.shape for s in theirs.copied}
    assert (ours.packed_bytes, ours.source_bytes) == (theirs.packed_bytes, theirs.source_bytes)


def test_a_tiny_model_is_of_the_architecture_and_small(tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = tiny(LLAMA_7B.architecture, tmp_path, ["a few words"])
    model = AutoModelForCausalLM.from_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert type(model).__name__ == "LlamaForCausalLM"
    assert sum(prod(p.shape) for p in model.parameters()) < 200_000
    ids = tokenizer("ünknown wörds", "too", return_tensors="pt")["input_ids"]
    assert ids.max() < model.config.vocab_size
    assert tokenizer.decode(ids[0], skip_special_tokens=True) == "ünknown wördstoo"


@pytest.mark.parametrize("name", known_recipes())
def test_a_packaged_comparison_can_be_planned(name: str) -> None:
    planned = plan_comparison(load_recipe(name))
    assert planned.headers == HEADERS_ONLY
    assert planned.problems == []
    assert sum(entry.cells for entry in planned.lines) == planned.cells
    for entry in planned.lines:
        assert entry.bytes is not None
        quantized = entry.line[1] is not None
        assert bool(entry.bytes.packed) == quantized
        assert entry.training_held is not None
        assert entry.training_held > entry.bytes.packed + entry.bytes.dense
        if entry.training_peak is not None:
            assert entry.training_held < entry.training_peak
        if quantized and planned.model.startswith("meta-llama"):
            assert entry.training_peak
            assert entry.training_peak > entry.bytes.packed


def test_the_bytes_of_a_paper_row_are_those_of_the_paper() -> None:
    lines = {entry.line: entry for entry in plan_comparison(LLAMA_7B).lines}
    mixed = {word: lines["loftq-paper", word, 64].bits_per_weight for word in ("4", "3", "2.5")}
    assert mixed == pytest.approx({"4": 4.5, "3": 3.5, "2.5": 3.0})  # float32 scales: half a bit
    sixteen = lines["lora16", None, 64]
    assert sixteen.bytes is not None
    assert sixteen.bytes.dense == 2 * 6_738_415_616
    adapters = 64 * 32 * (4 * (4096 + 4096) + 3 * (4096 + 11008))
    assert sixteen.training_held == 2 * 6_738_415_616 + 4 * 4 * adapters
    (full,) = plan_comparison(LLAMA_7B.changed(methods=["full"], formats=())).lines
    assert full.training_held == 16 * 6_738_415_616
    small = LLAMA_7B.changed(methods=["full"], formats=(), options={"optimizer": "adamw_8bit"})
    (full,) = plan_comparison(small).lines
    assert full.training_held == 10 * 6_738_415_616


def test_a_predicted_peak_is_that_of_the_settings_of_the_cells() -> None:
    def peak(**options: object) -> int:
        chosen = LLAMA_7B.changed(methods=["qlora"], formats=("nf4-g64-dq",), options=options)
        (line,) = plan_comparison(chosen).lines
        assert line.training_peak is not None
        return line.training_peak

    usual = peak(checkpointing=True)
    assert peak(checkpointing=True, keep_blocks=8) > usual
    assert peak(checkpointing=True, optimizer="adamw_8bit") < usual


def test_a_line_that_cannot_be_quantized_is_named() -> None:
    planned = plan_comparison(load_recipe("glue-minilm").changed(methods=["loftq"], ranks=(500,)))
    (problem,) = planned.problems
    assert "loftq, nf2-g64-dq, rank 500" in problem
    assert "rank=500 exceeds" in problem


def test_a_model_that_is_nowhere_is_refused() -> None:
    from dataclasses import replace

    recipe = replace(load_recipe("glue-minilm"), architecture={})
    with pytest.raises(ValueError, match="is not a folder, and the recipe has no architecture"):
        plan_comparison(recipe)
