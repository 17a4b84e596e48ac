"""Measured allocations end to end: the table is filled once, reused, resumed and recorded."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

import loftq
import zoo
from loftq.integrations import allocate
from loftq.pipeline import stream
from loftq.pipeline.plan import PlanError
from loftq.report import inspect_output
from test_calibrated import place  # noqa: F401  a fixture

OPTIONS = {
    "bits": 2.8, "rank": 4, "calibration_windows": 20, "calibration_context": 32,
    "allocation_windows": 2,
}  # fmt: skip
WAYS = [("error", "loftq"), ("error", "cloq"), ("relative", "qera-approx"), ("kl", "loftq"),
        ("error", "lq-lora")]  # fmt: skip


def options(place: Path, **more: object) -> dict:  # noqa: F811
    return {**OPTIONS, "data": str(place / "some.jsonl"), **more}


@pytest.mark.parametrize(("allocation", "method"), WAYS)
def test_quantize_measures_chooses_and_records(
    allocation: str,
    method: str,
    place: Path,  # noqa: F811
) -> None:
    settings = options(place, allocation=allocation, method=method)
    result = loftq.quantize(place / "llama", place / "out", **settings)
    choice = result.plan.choice
    assert choice is not None
    assert result.plan.packed_bytes == choice.nbytes <= choice.budget
    assert result.plan.bits_per_weight <= 2.8
    assert len({str(layer.spec) for layer in result.plan.layers}) > 1
    for rival in choice.rivals:
        assert choice.cost <= rival.cost
    record = json.loads((place / "out" / "loftq.json").read_text())
    assert record["allocation"]["cost"] == choice.cost
    assert [x["format"] for x in record["layers"]] == list(choice.formats.values())
    assert inspect_output(place / "out", True, place / "llama").problems == []
    assert loftq.load(place / "out") is not None


def test_the_table_holds_the_error_of_what_is_stored(place: Path) -> None:  # noqa: F811
    """cost = ||W - Q - s B A||^2, computed here from the files of a uniform output."""
    from safetensors.torch import load_file

    settings = {"rank": 4, "alpha": 8}
    result = loftq.quantize(place / "llama", place / "flat", format="nf2-g64-dq", **settings)
    planned = loftq.plan(place / "llama", measure=True, allocation="error", bits=2.8, **settings)
    table = next((place / "cache").rglob("error-*.jsonl"))
    rows = [json.loads(line) for line in table.read_text().splitlines()[1:]]
    costs = {row["module"]: row["cost"] for row in rows if row["format"] == "nf2-g64-dq"}
    dense = load_file(place / "llama" / "model.safetensors")
    for record, layer in zip(result.records, planned.layers, strict=True):
        norm = dense[layer.info.tensor].double().norm().item()
        assert costs[record["name"]] == pytest.approx((record["error"] * norm) ** 2, rel=0.02)


def test_a_plan_reads_headers_only_until_it_is_told_to_measure(place: Path) -> None:  # noqa: F811
    settings = options(place, allocation="error")
    with pytest.raises(PlanError, match=r"42 of 42 costs are not measured yet.*plan --measure"):
        loftq.plan(place / "llama", **settings)
    seen: list[tuple[str, int, int]] = []
    planned = loftq.plan(
        place / "llama", measure=True, on_cost=lambda *about: seen.append(about), **settings
    )
    assert [done for _, done, _ in seen] == list(range(1, 43))
    assert loftq.plan(place / "llama", **settings).choice == planned.choice


def test_the_table_serves_other_budgets_and_only_gaps_are_measured(
    place: Path,  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    settings = options(place, allocation="error")
    loftq.plan(place / "llama", measure=True, **settings)
    solved: list[str] = []
    real = stream.solve_batch

    def counted(plan: object, batch: object, *rest: object) -> object:
        solved.extend(layer.info.module for layer in batch.layers)  # type: ignore[attr-defined]
        return real(plan, batch, *rest)  # type: ignore[arg-type]

    monkeypatch.setattr(stream, "solve_batch", counted)
    wide = loftq.plan(place / "llama", measure=True, **{**settings, "bits": 3.5})
    assert solved == []
    assert wide.bits_per_weight > 2.8
    more = ("nf2-g64-dq", "nf4-g64-dq", "int2-g64-dq")
    loftq.plan(place / "llama", measure=True, candidates=more, **settings)
    assert len(solved) == 14  # the one format that is new


def test_a_killed_measurement_goes_on_where_it_was(place: Path) -> None:  # noqa: F811
    settings = options(place, allocation="kl")
    whole = loftq.plan(place / "llama", measure=True, **settings).choice
    file = next((place / "cache").rglob("kl-*.jsonl"))
    expected = file.read_text()
    file.write_text(expected[: len(expected) // 2])  # within a line
    seen: list[int] = []
    again = loftq.plan(
        place / "llama", measure=True, on_cost=lambda _, done, __: seen.append(done), **settings
    )
    assert 0 < len(seen) < 30
    assert sorted(file.read_text().splitlines()) == sorted(expected.splitlines())
    assert again.choice == whole


def test_measuring_leaves_the_model_as_it_was(place: Path) -> None:  # noqa: F811
    model = zoo.build("llama")
    windows = allocate.TokenWindows(
        ids=torch.arange(40).reshape(2, 20) + 5,
        mask=torch.ones(2, 20, dtype=torch.bool),
        source="",
    )
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    cost = allocate.output_cost(model, windows, allocate_kl())
    planned = loftq.plan(place / "llama", rank=4)
    info = planned.layers[3].info
    weight = model.get_submodule(info.module).weight.detach()
    assert cost(info, weight) == pytest.approx(0, abs=1e-6)
    assert cost(info, torch.zeros_like(weight)) > cost(info, 0.9 * weight) > 0
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def allocate_kl() -> allocate.OutputCost:
    from loftq.allocation import ALLOCATIONS

    found = ALLOCATIONS["kl"].of_outputs
    assert found is not None
    return found


def test_costs_may_come_from_another_method(place: Path) -> None:  # noqa: F811
    settings = options(place, allocation="error")
    own = loftq.plan(place / "llama", measure=True, **settings).choice
    other = loftq.plan(
        place / "llama", measure=True, **{**settings, "method": "cloq", "costs_by": "loftq"}
    )
    assert own is not None
    assert other.choice == own  # by the same table, which is not measured again
    assert len(list((place / "cache").rglob("error-*.jsonl"))) == 1
    assert other.calibration is not None
    with pytest.raises(ValueError, match="unknown method 'none'"):
        loftq.plan(place / "llama", costs_by="none")


def test_an_interrupted_refinement_of_an_allocation_goes_on(
    place: Path,  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The output is whole by then and holds no journal: it is neither refused nor made again."""
    from loftq.integrations.refine.sitting import Sitting

    settings = options(place, allocation="error", refine="block", refine_epochs=1)
    loftq.quantize(place / "llama", place / "whole", **settings)
    real = Sitting._write

    def stopping(self: Sitting, name: str, value: object) -> None:
        real(self, name, value)  # type: ignore[arg-type]
        raise KeyboardInterrupt

    monkeypatch.setattr(Sitting, "_write", stopping)
    with pytest.raises(KeyboardInterrupt):
        loftq.quantize(place / "llama", place / "out", **settings)
    monkeypatch.setattr(Sitting, "_write", real)
    with pytest.raises(ValueError, match="holds a finished model"):
        loftq.quantize(place / "llama", place / "out", **{**settings, "refine_epochs": 2})
    loftq.quantize(place / "llama", place / "out", **settings)
    start = "init_adapter/adapter_model.safetensors"
    assert (place / "out" / start).read_bytes() == (place / "whole" / start).read_bytes()
    with pytest.raises(ValueError, match="holds a finished model"):
        loftq.quantize(place / "llama", place / "out", **settings)


def test_a_refinement_changes_no_cost(place: Path) -> None:  # noqa: F811
    settings = options(place, allocation="error", method="loftq")
    plain = loftq.plan(place / "llama", measure=True, **settings)
    refined = loftq.plan(place / "llama", refine="distill", **settings)  # by the same table
    assert refined.choice == plain.choice
    fast = loftq.plan(place / "llama", measure=True, **{**settings, "method": "fast"})
    assert loftq.plan(place / "llama", **{**settings, "method": "max"}).choice == fast.choice


def test_named_formats_and_tables_stay_out_of_the_budget(place: Path) -> None:  # noqa: F811
    settings = options(place, allocation="error", formats={"*.down_proj": "nf4"}, head=8)
    planned = loftq.plan(place / "llama", measure=True, **settings)
    choice = planned.choice
    assert choice is not None
    assert not any("down_proj" in module or "head" in module for module in choice.formats)
    by_name = {layer.info.module: str(layer.spec) for layer in planned.layers}
    assert by_name["model.layers.0.mlp.down_proj"] == "nf4-g64-dq"
    assert by_name["lm_head"] == "sint8-g64-f16"
    assert 8 * choice.nbytes / choice.weights <= 2.8


def test_a_model_in_training_is_measured_without_dropout(place: Path) -> None:  # noqa: F811
    from transformers import AutoTokenizer

    def factors(training: bool) -> dict[str, torch.Tensor]:
        model = zoo.build("gpt2").train(training)
        assert any(isinstance(m, torch.nn.Dropout) and m.p for m in model.modules())
        tokenizer = AutoTokenizer.from_pretrained(place / "llama")
        chosen = {"method": "lq-lora", "bits": 4, "calibration_windows": 2}
        made = loftq.quantize_model(model, tokenizer=tokenizer, **options(place, **chosen))
        assert made.get_base_model().training is training
        return {name: p for name, p in made.state_dict().items() if "lora_" in name}

    evaluated = factors(False)
    for name, factor in factors(True).items():
        assert torch.equal(factor, evaluated[name])


def test_a_loaded_model_gets_the_same_formats(place: Path) -> None:  # noqa: F811
    from transformers import AutoTokenizer

    settings = options(place, allocation="kl")
    planned = loftq.plan(place / "llama", measure=True, **settings)
    model = loftq.quantize_model(
        zoo.build("llama"),
        tokenizer=AutoTokenizer.from_pretrained(place / "llama"),
        **settings,
    )
    found = {
        name: str(module.spec)
        for name, module in model.get_base_model().named_modules()
        if hasattr(module, "spec")
    }
    assert planned.choice is not None
    assert {
        name.replace(".base_layer", ""): spec for name, spec in found.items()
    } == planned.choice.formats


@pytest.mark.parametrize(
    ("model", "settings", "message"),
    [
        ("llama", {"allocation": "kl", "data": None}, "allocation=kl: needs text to measure on"),
        ("bert", {"allocation": "kl"}, "predicts no next token. Choose allocation=error"),
        ("llama", {"allocation": "error", "method": "cloq", "data": None}, "needs text to calib"),
        (
            "llama",
            {"allocation": "error", "bits": 2},
            r"a budget of 2 bits .* take 2\.",
        ),
        ("llama", {"allocation": "best"}, "choose one of first, error, relative, kl"),
        ("llama", {"allocation": "error", "format": "nf4"}, "leave format out"),
        ("llama", {"candidates": ("nf2", "nf4")}, "goes by depth and has no costs to choose"),
        ("llama", {"costs_by": "qlora"}, "costs_by: allocation=first goes by depth"),
        ("llama", {}, "measure: this allocation goes by depth and has no costs"),
        ("llama", {"allocation": "error", "candidates": ("nf2", "nf2-g64-dq")}, "two different"),
        ("llama", {"allocation": "error", "formats": {"model": "nf4"}}, "no layer is left"),
        ("llama", {"allocation": "kl", "allocation_windows": 0}, "must be at least 1"),
    ],
)
def test_what_cannot_be_allocated_is_said(
    model: str,
    settings: dict,
    message: str,
    place: Path,  # noqa: F811
) -> None:
    with pytest.raises(ValueError, match=message):
        loftq.plan(place / model, measure=True, **options(place, **settings))


def test_costs_of_a_sequential_method_are_refused_and_those_of_another_taken(
    place: Path,  # noqa: F811
) -> None:
    settings = options(place, allocation="error", method="best")
    with pytest.raises(PlanError, match="costs_by=fast"):
        loftq.plan(place / "llama", measure=True, **settings)
    planned = loftq.plan(place / "llama", measure=True, costs_by="qera-exact", **settings)
    assert planned.choice is not None


def test_memory_and_a_measured_allocation_exclude_each_other(place: Path) -> None:  # noqa: F811
    from loftq.train.memory.source import configurable

    with pytest.raises(ValueError, match=r"allocation=kl: memory chooses one width .* train OUT"):
        configurable(place / "llama", {"allocation": "kl", "bits": 2.8})
