"""Ranks beside formats in a measured allocation: counted, stored, loaded, trained and refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

import loftq
from loftq.report import inspect_output
from test_calibrated import place  # noqa: F401  a fixture

# More bytes than the wider format takes, so that the rest goes where a rank does most.
OPTIONS = {
    "bits": 3.5, "rank": 4, "ranks": (2, 4, 8), "candidates": ("nf2", "nf3"),
    "allocation": "error", "calibration_windows": 20, "calibration_context": 32,
}  # fmt: skip


def adapter_bytes(plan: object) -> int:
    return 2 * plan.adapter_parameters  # type: ignore[attr-defined]


@pytest.mark.parametrize("method", ["loftq", "cloq"])
@pytest.mark.parametrize("rslora", [False, True])
def test_every_layer_gets_a_format_and_a_rank_within_the_bytes_of_the_uniform_rank(
    method: str,
    rslora: bool,
    place: Path,  # noqa: F811
) -> None:
    data = {"method": method, "rslora": rslora, "data": str(place / "some.jsonl")}
    result = loftq.quantize(place / "llama", place / "out", **OPTIONS, **data)
    plan = result.plan
    ranks = {layer.info.module: layer.rank for layer in plan.layers}
    assert ranks == plan.choice.ranks
    assert len(set(ranks.values())) > 1
    assert plan.packed_bytes + adapter_bytes(plan) == plan.choice.nbytes <= plan.choice.budget
    everywhere = sum(2 * 4 * sum(layer.info.shape) for layer in plan.layers)
    assert plan.choice.budget == int(3.5 * plan.weights / 8) + everywhere
    assert all(plan.choice.cost <= rival.cost for rival in plan.choice.rivals)
    record = json.loads((place / "out" / "loftq.json").read_text())
    assert {x["name"]: x["rank"] for x in record["layers"]} == ranks
    report = inspect_output(place / "out", True, place / "llama")
    assert report.problems == []
    assert report.model["ranks"] == sorted(set(ranks.values()))


def test_a_loaded_model_has_the_error_of_its_records(place: Path) -> None:  # noqa: F811
    """Through PEFT's own rank and alpha patterns."""
    from safetensors.torch import load_file

    result = loftq.quantize(place / "llama", place / "out", **OPTIONS, alpha=8)
    model = loftq.load(place / "out")
    dense = load_file(place / "llama" / "model.safetensors")
    errors = {record["name"]: record["error"] for record in result.records}
    for layer in result.plan.layers:
        module = model.get_submodule(f"base_model.model.{layer.info.module}")
        assert module.r["default"] == layer.rank
        assert module.scaling["default"] == pytest.approx(2.0)
        held = module.get_base_layer().dequantize() + module.get_delta_weight("default")
        W = dense[layer.info.tensor]
        error = ((W - held).norm() / W.norm()).item()
        assert error == pytest.approx(errors[layer.info.module], rel=1e-3)


def test_each_rank_has_a_table_that_serves_a_uniform_rank_too(
    place: Path,  # noqa: F811
) -> None:
    seen: list[tuple[str, int, int]] = []

    def on_cost(*about: object) -> None:
        seen.append(about)  # type: ignore[arg-type]

    loftq.plan(place / "llama", measure=True, on_cost=on_cost, **OPTIONS)
    assert [done for _, done, _ in seen] == list(range(1, 85))  # 14 layers, 2 formats, 3 ranks
    assert len(list((place / "cache").rglob("error-*.jsonl"))) == 3
    seen.clear()
    loftq.plan(place / "llama", measure=True, on_cost=on_cost, **{**OPTIONS, "ranks": ()})
    loftq.plan(place / "llama", measure=True, on_cost=on_cost, **{**OPTIONS, "ranks": (8, 2)})
    assert seen == []
    one_format = {**OPTIONS, "candidates": ("nf2-g64-dq",)}
    plan = loftq.plan(place / "llama", **one_format)
    assert {str(layer.spec) for layer in plan.layers} == {"nf2-g64-dq"}
    assert seen == []


def test_more_choice_never_costs_more(place: Path) -> None:  # noqa: F811
    fixed = loftq.plan(place / "llama", measure=True, **{**OPTIONS, "ranks": ()}).choice
    free = loftq.plan(place / "llama", measure=True, **OPTIONS).choice
    assert free.cost <= fixed.cost


def test_an_interrupted_run_ends_in_the_same_ranks(
    place: Path,  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from loftq.pipeline import run

    whole = loftq.quantize(place / "llama", place / "whole", **OPTIONS)
    real, count = run._write, [0]

    def broken(*parts: object) -> float:
        count[0] += 1
        if count[0] == 4:
            raise OSError("pulled")
        return real(*parts)  # type: ignore[arg-type]

    monkeypatch.setattr(run, "_write", broken)
    with pytest.raises(OSError, match="pulled"):
        loftq.quantize(place / "llama", place / "cut", **OPTIONS)
    again = loftq.quantize(place / "llama", place / "cut", **OPTIONS)
    assert again.plan.choice == whole.plan.choice
    for name in ("init_adapter/adapter_model.safetensors", "init_adapter/adapter_config.json"):
        one, other = ((place / folder / name).read_bytes() for folder in ("whole", "cut"))
        assert one.replace(b"whole", b"cut") == other


def test_the_adapter_of_several_ranks_trains(place: Path) -> None:  # noqa: F811
    loftq.quantize(place / "llama", place / "out", **OPTIONS)
    model = loftq.load(place / "out", trainable=True)
    ids = torch.randint(5, 80, (2, 12), generator=torch.Generator().manual_seed(0))
    model(input_ids=ids, labels=ids).loss.backward()
    grads = {n: p.grad for n, p in model.named_parameters() if p.requires_grad}
    assert {g.shape[0] for n, g in grads.items() if "lora_A" in n} > {2}
    assert all(torch.isfinite(g).all() and g.abs().sum() > 0 for g in grads.values())


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"ranks": (8,)}, "ranks=8: name two different ranks or more"),
        ({"ranks": (8, 8)}, "ranks=8,8: name two different ranks or more"),
        ({"ranks": (0, 8)}, "each at least 1"),
        (
            {"ranks": (2, 4), "allocation": "first", "candidates": ()},
            "ranks: allocation=first goes by depth",
        ),
        ({"ranks": (4, 4096)}, r"rank=4096 exceeds min\("),
    ],
)
def test_ranks_that_cannot_be_chosen_from_are_said(
    settings: dict,
    message: str,
    place: Path,  # noqa: F811
) -> None:
    with pytest.raises(ValueError, match=message):
        loftq.plan(place / "llama", measure=True, **{**OPTIONS, **settings})


@pytest.mark.parametrize("changes", [{}, {"alpha_pattern": {"layers.0.mlp.up_proj": 20}}])
def test_ranks_and_alphas_of_their_own_are_merged(
    place: Path,  # noqa: F811
    tmp_path: Path,
    changes: dict,
) -> None:
    from transformers import AutoModelForCausalLM

    loftq.quantize(place / "llama", place / "out", **OPTIONS, rslora=True)
    config = place / "out" / "init_adapter" / "adapter_config.json"
    found = json.loads(config.read_text())
    assert len(set(found["rank_pattern"].values()) | {found["r"]}) > 1
    config.write_text(json.dumps(found | changes))
    loftq.export(place / "out", to="dense", output=tmp_path / "dense", dtype="float32")
    dense = AutoModelForCausalLM.from_pretrained(tmp_path / "dense").eval()
    ids = torch.arange(5, 25)[None]
    with torch.no_grad():
        found, wanted = dense(ids).logits, loftq.load(place / "out").eval()(ids).logits
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)
