"""Every kind of task, trained for two steps on tiny models of every family that it is for."""

import json
import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import yaml
from transformers import Trainer

from loftq.integrations.run_folder import RunError, backbone_and_adapter
from loftq.lab.compare.standin_rows import write_rows
from loftq.tasks import TASKS, TaskError, evaluate, load_task_model
from loftq.train import OutOfMemory, TrainError

CASES = [
    ("rte", "bert"), ("rte", "mpnet"), ("rte", "deberta-v3"), ("rte", "roberta"), ("rte", "llama"),
    ("rte", "bart"), ("rte", "t5"), ("mnli", "bert"), ("stsb", "mpnet"), ("cola", "deberta-v3"),
    ("xquad-en", "bert"), ("xquad-en", "deberta-v3"), ("gsm8k", "llama"), ("gsm8k-loss", "llama"),
    ("wikitext2-small", "llama"), ("scitldr", "bart"), ("scitldr", "t5"), ("scitldr", "llama"),
]  # fmt: skip
LENGTHS = {"wikitext2-small": 32, "xquad-en": 96}


@pytest.mark.parametrize(("task", "name"), CASES)
def test_a_run_scores_what_its_folder_scores_again(
    task: str, name: str, train: Callable, model_of: Callable, data: Path, tmp_path: Path
) -> None:
    length = LENGTHS.get(task)
    result = train(model_of(name), task, tmp_path / "run", max_length=length)
    assert set(result.metrics) == set(TASKS[task].splits.test)
    for split, scores in result.metrics.items():
        assert tuple(scores) == TASKS[task].metric_names or set(scores) == set(
            TASKS[task].metric_names
        )
        lines = (tmp_path / "run" / f"predictions-{split}.jsonl").read_text().splitlines()
        assert all("prediction" in json.loads(line) for line in lines)
        for score in scores.values():
            assert score["low"] <= score["value"] <= score["high"]
    again = evaluate(tmp_path / "run", task, data=data, device="cpu", batch_size=8)
    assert again.adapter == "adapter"
    for split, scores in result.metrics.items():
        for metric, score in scores.items():
            found = again.metrics[split][metric]["value"]
            assert found == pytest.approx(score["value"], rel=1e-4, abs=1e-6), metric


@pytest.mark.parametrize("method", ["full", "lora16"])
@pytest.mark.parametrize(("task", "name"), [("rte", "mpnet"), ("gsm8k-loss", "llama")])
def test_a_baseline_trains_the_original_model(
    method: str, task: str, name: str, train: Callable, model_of: Callable, data: Path,
    tmp_path: Path,
) -> None:  # fmt: skip
    result = train(model_of(name), task, tmp_path / "run", method=method)
    assert result.bytes["backbone"] == 0
    assert result.bytes["total"] == sum(v for k, v in result.bytes.items() if k != "total")
    assert (tmp_path / "run" / ("model" if method == "full" else "adapter")).is_dir()
    again = evaluate(tmp_path / "run", task, data=data, device="cpu")
    assert again.value == pytest.approx(result.value, rel=1e-4, abs=1e-6)
    with pytest.raises(RunError, match=f"a baseline \\({method}\\)"):
        backbone_and_adapter(tmp_path / "run")


@pytest.mark.parametrize("method", [None, "lora16", "full"])
@pytest.mark.parametrize(("task", "name"), [("rte", "mpnet"), ("scitldr", "bart")])
def test_sixteen_bits_with_a_head_in_float32(
    method: str | None, task: str, name: str, train: Callable, model_of: Callable, data: Path,
    tmp_path: Path,
) -> None:  # fmt: skip
    options = {"method": method} if method else {}
    result = train(model_of(name), task, tmp_path / "run", dtype="bf16", **options)
    assert result.summary["dtype"] == "bf16"
    assert math.isfinite(result.summary["final_loss"])
    scored = evaluate(tmp_path / "run", task, data=data, device="cpu", batch_size=8)
    assert scored.dtype == ("float32" if method == "full" else "bfloat16")  # full: master weights
    assert scored.value == pytest.approx(result.value, abs=1e-6)
    other = evaluate(tmp_path / "run", task, data=data, device="cpu", dtype="bfloat16", limit=4)
    assert other.dtype == "bfloat16"


def test_the_original_is_larger_than_the_packed_model(
    train: Callable, model_of: Callable, tmp_path: Path
) -> None:
    packed = train(model_of("bert"), "rte", tmp_path / "packed")
    dense = train(model_of("bert"), "rte", tmp_path / "dense", method="lora16")
    assert 0 < packed.bytes["backbone"] < packed.bytes["total"] < dense.bytes["total"]
    assert packed.bytes["adapter"] == dense.bytes["adapter"]


@pytest.mark.parametrize(
    ("task", "name"),
    [("rte", "bert"), ("stsb", "mpnet"), ("scitldr", "t5"),
     ("scitldr", "bart"), ("gsm8k-loss", "llama")],
)  # fmt: skip
def test_batches_of_a_step_are_one_batch(
    task: str, name: str, train: Callable, model_of: Callable, tmp_path: Path
) -> None:
    def losses(rows: int, batches: int) -> tuple[float, float]:
        run = tmp_path / f"{rows}x{batches}"
        options = {"max_length": LENGTHS.get(task), "train_rows": 8, "max_steps": 1}
        train(model_of(name), task, run, batch_size=rows, gradient_accumulation=batches, **options)
        first = json.loads((run / "metrics.jsonl").read_text().splitlines()[1])
        return first["loss"], first["grad_norm"]

    whole, parts = losses(8, 1), losses(2, 4)
    assert parts[0] == pytest.approx(whole[0], rel=0.02)  # rows differ in length, not in number
    assert parts[1] == pytest.approx(whole[1], rel=0.3)


@pytest.mark.parametrize("method", [None, "full"])
def test_a_fused_head_gives_the_losses_of_full_logits(
    method: str | None, train: Callable, model_of: Callable, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    from loftq.train import prepare

    pytest.importorskip("trl")
    options = {"method": method} if method else {}
    options |= {"gradient_accumulation": 2, "batch_size": 2, "samples": 0}
    fused = train(model_of("llama"), "gsm8k-loss", tmp_path / "fused", **options)
    monkeypatch.setattr(prepare, "add_fused_head", lambda base: False)
    plain = train(model_of("llama"), "gsm8k-loss", tmp_path / "plain", **options)
    for key in ("final_loss", "first_validation_loss", "best_validation_loss"):
        assert fused.summary[key] == pytest.approx(plain.summary[key], rel=1e-3), key


def test_a_full_memory_counts_every_answer_of_a_choice_as_a_row(
    train: Callable, model_of: Callable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*args: object, **kwargs: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(Trainer, "training_step", full)
    rows = write_rows(["dream"], tmp_path / "data")
    with pytest.raises(OutOfMemory, match=r"on a batch of 12 x \d+ = [\d,]+ tokens"):
        train(model_of("bert"), "dream", tmp_path / "run", data=rows)


def test_the_head_is_trained_and_seeded(
    train: Callable, model_of: Callable, tmp_path: Path
) -> None:
    from safetensors.torch import load_file

    def head(folder: Path) -> torch.Tensor:
        found = load_file(folder / "adapter/adapter_model.safetensors")
        return next(v for k, v in found.items() if k.endswith("classifier.out_proj.weight"))

    for name, options in (("a", {}), ("b", {}), ("other", {"seed": 1})):
        train(model_of("mpnet"), "rte", tmp_path / name, **options)
    train(model_of("mpnet"), "rte", tmp_path / "still", learning_rate=1e-12)
    assert torch.equal(head(tmp_path / "a"), head(tmp_path / "b"))
    assert not torch.equal(head(tmp_path / "a"), head(tmp_path / "other"))
    moved = (head(tmp_path / "a") - head(tmp_path / "still")).abs().max()
    assert moved > 1e-6


def test_seeds_share_one_backbone(train: Callable, model_of: Callable, tmp_path: Path) -> None:
    for seed in (0, 1):
        train(model_of("bert"), "rte", tmp_path / str(seed), seed=seed)
    bases = [json.loads((tmp_path / str(seed) / "base.json").read_text()) for seed in (0, 1)]
    assert bases[0]["backbone"] == bases[1]["backbone"]
    assert bases[0]["path"] == bases[1]["path"]


def test_the_records_of_a_run(train: Callable, model_of: Callable, tmp_path: Path) -> None:
    run = tmp_path / "run"
    result = train(model_of("bert"), "mrpc", run, train_rows=16, eval_rows=6)
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    validations = [row for row in rows if "validation_loss" in row]
    assert [row["step"] for row in validations] == [0, 1, 2]
    assert all({"accuracy", "f1"} <= set(row) for row in validations)
    accuracy = result.metrics["validation"]["accuracy"]["value"]
    assert rows[-1]["summary"]["validation_accuracy"] == accuracy
    best = max(validations, key=lambda row: row["accuracy"])
    assert rows[-1]["summary"]["best_step"] in {
        row["step"] for row in validations if row["accuracy"] == best["accuracy"]
    }
    config = yaml.safe_load((run / "config.yaml").read_text())
    assert (config["task"], config["train_rows"], config["learning_rate"]) == ("mrpc", 16, 1e-4)
    counts = json.loads((run / "data.json").read_text())
    assert (counts["trained_rows"], counts["format"]) == (16, "classification")
    (sample,) = json.loads((run / "samples.json").read_text())
    names = TASKS["mrpc"].labels
    assert {sample["reference"], sample["before"], sample["after"]} <= set(names)
    assert result.metrics["validation"]["accuracy"]["rows"] == 6


def test_a_finished_run_is_returned_and_other_settings_are_refused(
    train: Callable, model_of: Callable, tmp_path: Path
) -> None:
    first = train(model_of("bert"), "rte", tmp_path / "run")
    again = train(model_of("bert"), "rte", tmp_path / "run")
    assert again.already_finished
    assert again.metrics == first.metrics
    with pytest.raises(TrainError, match="finished run with other settings"):
        train(model_of("bert"), "rte", tmp_path / "run", seed=3)


def test_a_validation_says_how_far_it_is(
    train: Callable, model_of: Callable, tmp_path: Path
) -> None:
    from loftq.train.listener import Listener

    class Heard(Listener):
        def __init__(self) -> None:
            self.told: list = []

        def reading(self, what: str, done: int, total: int) -> None:
            self.told.append((what, done, total))

        def validation(self, row: dict, pace: object) -> None:
            self.told.append(row["step"])

    heard = Heard()
    train(model_of("bert"), "rte", tmp_path / "run", listener=heard, eval_batch_size=4, samples=0)
    one = [("batches", 1, 2), ("batches", 2, 2), ("rows", 4, 8), ("rows", 8, 8)]
    scored = [("rows", done, 12) for done in (4, 8, 12)]
    assert heard.told == [*one, 0, *one, 1, *one, 2, *scored]


@pytest.mark.parametrize("method", [None, "full"])
def test_an_interrupted_run_ends_as_one_that_was_not(
    method: str | None, train: Callable, model_of: Callable, tmp_path: Path
) -> None:
    from loftq.train.listener import Listener

    class Stop(Listener):
        def step(self, row: dict, pace: object) -> None:
            if row["step"] == 3:
                raise KeyboardInterrupt

    options = {"max_steps": 4, "method": method} if method else {"max_steps": 4}
    whole = train(model_of("mpnet"), "stsb", tmp_path / "whole", **options)
    with pytest.raises(KeyboardInterrupt):
        train(model_of("mpnet"), "stsb", tmp_path / "cut", listener=Stop(), **options)
    rest = train(model_of("mpnet"), "stsb", tmp_path / "cut", **options)
    assert rest.resumed == 2
    for name, score in whole.metrics["validation"].items():
        assert rest.metrics["validation"][name]["value"] == pytest.approx(score["value"], abs=1e-5)
    assert math.isclose(rest.summary["final_loss"], whole.summary["final_loss"], rel_tol=1e-4)


def test_a_model_without_the_head_is_refused(model_of: Callable, data: Path) -> None:
    with pytest.raises(TaskError, match=r"no head for mnli .* Train it first"):
        evaluate(model_of("t5"), "mnli", data=data, device="cpu")


def test_a_run_of_another_task_is_refused_and_of_the_same_classes_is_not(
    train: Callable, model_of: Callable, data: Path, tmp_path: Path
) -> None:
    train(model_of("bert"), "rte", tmp_path / "run")
    with pytest.raises(TaskError, match="was trained on rte, so it has no head for mnli"):
        evaluate(tmp_path / "run", "mnli", data=data, device="cpu")


def test_a_causal_model_is_scored_as_it_is(model_of: Callable, data: Path) -> None:
    found = evaluate(model_of("llama"), "gsm8k-loss", data=data, device="cpu", limit=3)
    assert found.adapter == "none"
    assert found.metrics["test"]["answer_loss"]["rows"] == 3
    assert found.value == pytest.approx(math.log(700), rel=0.2)  # random weights


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"method": "full", "bits": 2}, "method=full: bits would change nothing"),
        ({"method": "fast"}, "calibrates on a text of its own"),
        ({"packing": True}, "unknown option 'packing'"),
        ({"host_embedding": True}, "unknown option 'host_embedding'"),
        ({"max_length": 10_000}, "max_length=10000, and the model reads 256"),
        ({"holdout": 1.5}, "holdout=1.5"),
        ({"train_rows": 0}, "train_rows=0: must be at least 1"),
    ],
)
def test_options_that_cannot_be_are_refused_before_any_work(
    options: dict, message: str, train: Callable, model_of: Callable, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=message):
        train(model_of("bert"), "rte", tmp_path / "run", **options)
    assert not (tmp_path / "run" / "base.json").exists()


def test_a_model_that_cannot_do_the_task_is_refused_before_it_is_quantized(
    train: Callable, model_of: Callable, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match="transformers has no AutoModelForCausalLM for mpnet"):
        train(model_of("mpnet"), "gsm8k-loss", tmp_path / "run", cache=tmp_path / "cache")
    assert not list(tmp_path.glob("*/*"))


def test_a_baseline_wants_the_original_model(
    train: Callable, model_of: Callable, tmp_path: Path
) -> None:
    train(model_of("bert"), "rte", tmp_path / "run")
    packed = json.loads((tmp_path / "run/base.json").read_text())["path"]
    with pytest.raises(TaskError, match="Give the full-precision model"):
        train(Path(packed), "rte", tmp_path / "other", method="full")


def test_the_card_and_the_page_of_a_run_name_its_scores(
    train: Callable, model_of: Callable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from loftq.report.collect import collect
    from loftq.report.headline import next_commands, tiles

    result = train(model_of("mpnet"), "rte", tmp_path / "run")
    card = (tmp_path / "run/adapter/README.md").read_text()
    assert f"| rte validation, accuracy | {result.value:.4f} (95 % interval" in card
    code = card.split("```python\n")[1].split("```")[0]
    monkeypatch.chdir(tmp_path)
    namespace: dict = {}
    exec(code, namespace)
    ids = namespace["tokenizer"]("the cat", "the cat", return_tensors="pt")
    again, _ = load_task_model(tmp_path / "run", "rte")
    assert torch.equal(namespace["model"](**ids).logits, again(**ids).logits)
    facts = collect(tmp_path / "run")
    assert tiles(facts)[0].value == f"{result.value:.4f}"
    assert next_commands(facts)[0][0].startswith("loftq eval rte ")


def test_the_page_of_a_run_of_every_weight(
    train: Callable, model_of: Callable, tmp_path: Path
) -> None:
    from loftq.report.collect import collect

    train(model_of("mpnet"), "rte", tmp_path / "run", method="full")
    facts = collect(tmp_path / "run")
    assert facts.training is not None
    assert facts.backbone is None
    assert any("backbone" in line for line in facts.missing)


@pytest.mark.parametrize("method", [None, "lora16"])
def test_embeddings_take_part_as_in_the_paper(
    method: str | None, train: Callable, model_of: Callable, data: Path, tmp_path: Path
) -> None:
    from safetensors import safe_open

    options = {"method": method} if method else {}
    result = train(model_of("deberta-v3"), "rte", tmp_path / "run", embeddings=True, **options)
    file = tmp_path / "run/adapter/adapter_model.safetensors"
    with safe_open(file, framework="pt") as reader:
        keys = list(reader.keys())
    assert any("word_embeddings.lora_embedding_A" in key for key in keys)
    again = evaluate(tmp_path / "run", "rte", data=data, device="cpu")
    assert again.value == result.value
