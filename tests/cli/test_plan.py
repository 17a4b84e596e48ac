"""`loftq plan` says what there is to know, from headers alone."""

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

import tiny_chat
import zoo


def test_text_says_layers_totals_what_is_kept_and_where_it_serves(
    loftq: Callable, model: Path
) -> None:
    answer = loftq("plan", model, "--rank", 4, "--bits", 3)
    assert answer.code == 0
    assert answer.err == ""
    for words in (
        "nf3-g64-dq",
        "down_proj   48 x 75",
        "model.embed_tokens, 4,848 weights",
        "output head",
        "per quantized weight",
        "on the device when loaded",
        "of host memory while quantizing",
        "transformers + PEFT",
        "its only 4-bit NormalFloat is nf4",
    ):
        assert words in answer.out


def test_json_has_every_layer_and_the_totals(loftq: Callable, model: Path, tmp_path: Path) -> None:
    plan = loftq("plan", model, "--rank", 4, "-o", tmp_path / "a/b", "--json").json
    assert len(plan["layers"]) == 14
    assert plan["layers"][0]["module"] == "model.layers.0.self_attn.q_proj"
    assert plan["packed_bytes"] == sum(layer["packed_bytes"] for layer in plan["layers"])
    assert plan["seconds"] > 0
    assert plan["free_disk_bytes"] > 0
    assert {place["engine"] for place in plan["serving"] if place["exact"]} == {
        "transformers + PEFT"
    }
    assert not (tmp_path / "a").exists()


def test_reads_headers_only(loftq: Callable, model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from loftq.checkpoint import Checkpoint

    def forbidden(*_: object) -> None:
        raise AssertionError("read a tensor")

    monkeypatch.setattr(Checkpoint, "read", forbidden)
    monkeypatch.setattr(Checkpoint, "read_bytes", forbidden)
    assert loftq("plan", model, "--rank", 4).code == 0


def test_a_plan_for_a_gpu_needs_none(loftq: Callable, model: Path) -> None:
    assert loftq("plan", model, "--rank", 4, "--device", "cuda", "--json").json["device"] == "cuda"


def test_little_disk_is_said(
    loftq: Callable, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = type("Usage", (), {"free": 10})
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)
    answer = loftq("plan", model, "--rank", 4, "-o", tmp_path / "out")
    assert "10 B free" in answer.out
    assert "needed. Free some space" in answer.out


def test_for_picks_a_format(loftq: Callable, model: Path) -> None:
    plan = loftq("plan", model, "--rank", 4, "--for", "vllm", "--json").json
    assert plan["layers"][0]["format"] == "sint4-g64-f16"
    assert plan["choices"][0]["reason"] == "the one that vllm can hold without loss"


def test_a_method_may_prescribe_grid_and_fit_but_not_how_tables_are_stored(
    loftq: Callable, model: Path
) -> None:
    asked = ("--rank", 4, "--method", "ir-qlora", "--bits", 3, "embedding=8", "--json")
    layers = loftq("plan", model, *asked).json["layers"]
    found = {layer["format"]: layer["scale_fit"] for layer in layers}
    assert found == {"int3-g64-dq": "entropy", "sint8-g64-f16": "mse"}
    asked = ("--rank", 4, "--format", "int4-g16", "scale_fit=entropy", "embedding=8", "--json")
    layers = loftq("plan", model, *asked).json["layers"]
    found = {layer["format"]: layer["scale_fit"] for layer in layers}
    assert found == {"int4-g16-dq": "entropy", "sint8-g64-f16": "mse"}


def test_a_fit_that_a_format_does_not_have_is_refused_before_work(
    loftq: Callable, model: Path
) -> None:
    refused = loftq("plan", model, "--rank", 4, "--method", "ir-qlora", "--format", "nf4-g64-dq")
    assert refused.code == 1
    assert "nf4-g64-dq has no scale_fit=entropy; choose one of absmax, mse." in refused.err


def test_the_reasons_distinguish_defaults_from_wishes(loftq: Callable, model: Path) -> None:
    def reasons(*words: object) -> dict[str, str]:
        choices = loftq("plan", model, "--json", *words).json["choices"]
        return {choice["name"]: choice["reason"] for choice in choices}

    default = reasons()
    assert not any("as asked" in reason for reason in default.values())
    assert default["alpha"] == "= rank, so that the adapter enters with factor 1"
    asked = reasons("--bits", 2, "--rank", 8, "--alpha", 4, "--method", "qlora", "--skip", "k_proj",
                    "--device", "cpu", "scale_fit=mse")  # fmt: skip
    assert all("as asked" in reason for reason in asked.values())


def test_a_budget_chooses_and_says_why(loftq: Callable, model: Path) -> None:
    answer = loftq("plan", model, "--rank", 4, "--memory", "2GB")
    assert answer.code == 0
    for words in ("training within 2 GB", "rank           4", "as asked", "optimizer", "tokens"):
        assert words in answer.out
    plan = loftq("plan", model, "--rank", 4, "--memory", "2GB", "head=8", "--json").json
    training = plan["training"]
    assert training["options"] == {"bits": 4, "rank": 4, "embedding": 16, "head": 8}
    assert training["peak"]["total"] < training["usable"] < training["budget"] == 2 * 10**9
    assert training["tokens_per_step"] == training["settings"]["length"] * 8
    assert "lm_head" in [layer["module"] for layer in plan["layers"]]


def test_budgets_that_are_none_are_refused(loftq: Callable, model: Path) -> None:
    assert "not a size" in loftq("plan", model, "--rank", 4, "--memory", "plenty").err
    small = loftq("plan", model, "--rank", 4, "--memory", "501MB")
    assert small.code == 1
    assert "nothing fits. The least that training this model takes is" in small.err


def test_data_is_calibration_text_unless_there_is_a_budget(
    loftq: Callable, model: Path, tmp_path: Path
) -> None:
    text = tmp_path / "some.txt"
    text.write_text("one two three four five six " * 40)
    calibrated = ("plan", model, "--rank", 4, "--method", "cloq", "--data", text)
    found = loftq(*calibrated, "calibration_context=16", "--json").json
    assert found["calibration"]["source"] == "some.txt"
    refused = loftq(*calibrated, "--memory", "2GB")
    assert refused.code == 1
    assert "data is training data here. Give calibration=TEXT" in refused.err
    both = loftq(
        "plan", model, "--rank", 4, "--method", "cloq", f"calibration={text}", "--memory", "2GB",
        "calibration_context=16", "--json",
    ).json  # fmt: skip
    assert both["calibration"]["source"] == "some.txt"
    plain = loftq("plan", model, "--rank", 4, "--data", tmp_path / "some.txt")
    assert "loftq needs no text" in plain.out
    costs = ("--bits", 2.8, "--allocation", "kl", "--measure", "allocation_windows=1")
    measured = loftq("plan", model, "--rank", 4, "--data", text, "calibration_context=16", *costs)
    assert "costs of layers, by allocation=kl" in measured.out
    assert "needs no text" not in measured.out


def test_a_sequence_keeps_no_statistics(loftq: Callable, model: Path, tmp_path: Path) -> None:
    text = tmp_path / "some.txt"
    text.write_text("one two three four five six " * 40)
    calibrated = ("plan", model, "--rank", 4, "--data", text, "calibration_context=16")
    best = loftq(*calibrated, "--method", "best")
    assert "for this run alone" in best.out
    assert "used again" not in best.out
    costs = [
        loftq(*calibrated, "--method", m, "--json").json["calibration"] for m in ("best", "fast")
    ]
    assert costs[0]["disk_bytes"] == 0
    assert costs[0]["seconds"] > 5 * costs[1]["seconds"]
    assert costs[0]["device_bytes"] == 2 * costs[1]["device_bytes"]


def test_data_beside_a_budget_is_training_data(loftq: Callable, tmp_path: Path) -> None:
    model = tiny_chat.write_model(tmp_path / "model")
    text = tmp_path / "some.txt"
    text.write_text("one two three four five six " * 40)
    found = loftq("plan", model, "--rank", 4, "--data", text, "--memory", "2GB", "--json").json
    assert "data" not in [choice["name"] for choice in found["choices"]]
    assert found["training"]["tokens_per_epoch"] > 0
    shorter = loftq(
        "plan", model, "--rank", 4, "--data", text, "--memory", "2GB", "max_length=9",
        "optimizer=adamw_8bit", "--json",
    ).json["training"]  # fmt: skip
    assert shorter["settings"]["length"] == 9
    optimizer = [plan["peak"]["optimizer"] for plan in (shorter, found["training"])]
    assert 4 * optimizer[0] <= optimizer[1]


def test_keys_of_a_training_are_none_of_a_plan_without_a_budget(
    loftq: Callable, model: Path
) -> None:
    refused = loftq("plan", model, "--rank", 4, "max_length=64")
    assert refused.code == 2
    assert "max_length" in refused.err


def test_mostly_uncovered_models_need_consent(loftq: Callable, tmp_path: Path) -> None:
    folder = zoo.save(zoo.build("mixtral"), tmp_path / "moe")
    refused = loftq("plan", folder, "--rank", 4)
    assert refused.code == 1
    assert "expert tensors" in refused.err
    assert "--allow-uncovered" in refused.err
    assert "would stay 16-bit (expert tensors)." in refused.err  # not what stays by choice
    allowed = loftq("plan", folder, "--rank", 2, "--allow-uncovered")
    assert allowed.code == 0
    assert "expert tensors: cannot be packed yet" in allowed.out


def test_ranks_are_read_as_numbers_and_shown_beside_the_bits(
    loftq: Callable, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LOFTQ_CACHE", str(tmp_path / "cache"))
    asked = ("plan", model, "--rank", 4, "--bits", 3.5, "--allocation", "error", "--measure",
             "ranks=2,4,8", "candidates=nf2,nf3")  # fmt: skip
    answer = loftq(*asked)
    assert answer.code == 0, answer.err
    for words in ("bits/rank of each", "3/8", "16-bit adapters included", "least error cost, layer",
                  "nf3-g64-dq at rank 2"):  # fmt: skip
        assert words in answer.out
    found = loftq(*asked, "--json").json
    assert {layer["rank"] for layer in found["layers"]} == set(
        found["allocation"]["ranks"].values()
    )
    refused = loftq("plan", model, "--allocation", "error", "ranks=2,many")
    assert refused.code == 1
    assert "expected whole numbers" in refused.err


def test_a_measured_allocation_is_shown_beside_its_rivals(
    loftq: Callable, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LOFTQ_CACHE", str(tmp_path / "cache"))
    asked = ("plan", model, "--rank", 4, "--bits", 3.4, "--allocation", "error")
    refused = loftq(*asked)
    assert refused.code == 1
    assert "42 of 42 costs are not measured yet" in refused.err
    answer = loftq(*asked, "--measure")
    assert answer.code == 0
    for words in ("least error cost within 3.4 bits", "this choice", "nf2-g64-dq", "down_proj",
                  "at most 3.400 bits a weight"):  # fmt: skip
        assert words in answer.out
    found = loftq(*asked, "--json").json["allocation"]  # measured by now
    assert found["nbytes"] <= found["budget"]
    assert len(found["formats"]) == 14
    assert all(found["cost"] <= rival["cost"] for rival in found["rivals"])


def test_a_budget_keeps_to_what_goes_with_checkpointing(loftq: Callable, model: Path) -> None:
    asked = ("plan", model, "--rank", 4, "--memory", "2GB", "--json")
    assert not loftq(*asked).json["training"]["settings"]["checkpointing"]  # there is room
    for key in ("keep_blocks=1", "offload=true"):
        assert loftq(*asked, key).json["training"]["settings"]["checkpointing"], key
    refused = loftq(*asked, "keep_blocks=9")
    assert "keep_blocks=9: the model has 2 blocks" in refused.err
