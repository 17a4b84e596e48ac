"""`loftq.train`: what a run writes, how it goes on after a stop, and what it refuses."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file

import loftq
import tiny_chat
from loftq.checkpoint import CheckpointError
from loftq.integrations.metrics import read_metrics
from loftq.integrations.peft import read_lineage
from loftq.integrations.refine import Step
from loftq.integrations.run_folder import open_run
from loftq.report.collect import collect
from loftq.train import Briefing, Listener, OutOfMemory, Pace, TrainError
from loftq.train.config import TrainConfig

pytestmark = pytest.mark.compat


class Stop(Listener):
    """Interrupts a run after a step, as Ctrl-C does."""

    def __init__(self, step: int) -> None:
        self._step = step
        self.briefing: Briefing | None = None

    def ready(self, briefing: Briefing) -> None:
        self.briefing = briefing

    def step(self, row: Mapping[str, Any], pace: Pace) -> None:
        if row["step"] == self._step:
            raise KeyboardInterrupt


def adapter(run: Path) -> dict[str, torch.Tensor]:
    return load_file(run / "adapter/adapter_model.safetensors")


def test_a_run_holds_what_its_readers_expect(
    train: Callable, out: Path, chats: Path, tmp_path: Path
) -> None:
    result = train(out, chats, tmp_path / "run", learning_rate=5e-3)
    run = open_run(tmp_path / "run")
    metrics = read_metrics(run.metrics)
    assert [row["step"] for row in metrics.train] == [1, 2, 3, 4]
    assert set(metrics.train[0]) == {
        "step", "epoch", "loss", "learning_rate", "grad_norm", "tokens_per_second", "seconds",
        "peak_gb",
    }  # fmt: skip
    assert metrics.validation[0]["step"] == 0
    assert metrics.validation[-1]["validation_loss"] < metrics.validation[0]["validation_loss"]
    assert metrics.summary["steps"] == 4
    assert metrics.summary["best_validation_loss"] == metrics.best["validation_loss"]
    assert result.summary == metrics.summary
    samples = json.loads(run.samples.read_text())
    assert [set(row) for row in samples] == [{"prompt", "reference", "before", "after"}]
    assert json.loads(run.data.read_text())["trained_rows"] == 23
    assert run.base().path == out
    assert read_lineage(run.adapter) == run.base().backbone
    facts = collect(run.path)
    assert facts.training is not None
    assert facts.training.config["learning_rate"] == 5e-3
    assert not [path for path in run.path.iterdir() if "partial" in path.name]


def test_the_adapter_is_float32_trained_and_loads(
    train: Callable, out: Path, chats: Path, tmp_path: Path
) -> None:
    train(out, chats, tmp_path / "run", dtype="bf16")
    trained, start = (
        adapter(tmp_path / "run"),
        load_file(out / "init_adapter/adapter_model.safetensors"),
    )
    assert {tensor.dtype for tensor in trained.values()} == {torch.float32}
    assert trained.keys() == start.keys()
    assert any(not torch.equal(trained[name], start[name]) for name in start)
    model = loftq.load(out, adapter=tmp_path / "run/adapter")
    assert model(input_ids=torch.tensor([[5, 6]])).logits.isfinite().all()


def test_the_best_checkpoint_becomes_the_adapter(
    train: Callable, out: Path, chats: Path, tmp_path: Path
) -> None:
    """At a huge learning rate the last step is not the best one."""
    result = train(out, chats, tmp_path / "run", learning_rate=3.0, max_steps=6, eval_steps=1)
    best = result.summary["best_step"]
    losses = {
        r["step"]: r["validation_loss"]
        for r in read_metrics(tmp_path / "run/metrics.jsonl").validation
    }
    assert best == min((step for step in losses if step), key=losses.__getitem__)
    assert best < 6
    kept = load_file(tmp_path / f"run/checkpoints/checkpoint-{best}/adapter_model.safetensors")
    assert all(
        torch.equal(kept[name], tensor) for name, tensor in adapter(tmp_path / "run").items()
    )


def test_what_an_interruption_left_goes_on_to_the_same_end(
    train: Callable, out: Path, chats: Path, tmp_path: Path
) -> None:
    options = {"max_steps": 6, "eval_steps": 2, "learning_rate": 1e-2}
    whole = train(out, chats, tmp_path / "whole", **options)
    with pytest.raises(KeyboardInterrupt):
        train(out, chats, tmp_path / "run", listener=Stop(5), **options)
    listener = Stop(-1)
    resumed = train(out, chats, tmp_path / "run", listener=listener, **options)
    assert listener.briefing is not None
    assert listener.briefing.resumed == resumed.resumed == 4
    assert resumed.summary["final_loss"] == pytest.approx(whole.summary["final_loss"], abs=1e-6)
    for name, tensor in adapter(tmp_path / "whole").items():
        torch.testing.assert_close(adapter(tmp_path / "run")[name], tensor, rtol=0, atol=1e-7)
    lines = (tmp_path / "run/metrics.jsonl").read_text().splitlines()
    steps = [row["step"] for row in map(json.loads, lines) if "loss" in row]
    assert steps == [1, 2, 3, 4, 5, 6]
    assert resumed.samples == whole.samples


def test_a_killed_run_goes_on_to_the_same_end(
    train: Callable, out: Path, chats: Path, tmp_path: Path
) -> None:
    words = ["max_length=48", "chat_template=chatml", "sample_tokens=4", "max_steps=30",
             "eval_steps=3", "learning_rate=0.01", "report=false", "--device", "cpu"]  # fmt: skip
    command = [sys.executable, "-m", "loftq", "train", str(out), "--data", str(chats), "-o"]
    command += [str(tmp_path / "run"), *words]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    checkpoint = tmp_path / "run/checkpoints/checkpoint-6"
    while not checkpoint.exists() and process.poll() is None:
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    _, errors = process.communicate()
    assert process.returncode == -signal.SIGKILL, errors.decode()
    assert not (tmp_path / "run/adapter").exists()
    with pytest.raises(ValueError, match="the run has not ended"):
        open_run(tmp_path / "run")
    assert subprocess.run(command, stdout=subprocess.DEVNULL).returncode == 0
    options = {"max_steps": 30, "eval_steps": 3, "learning_rate": 0.01}
    whole = train(out, chats, tmp_path / "whole", **options)
    found = read_metrics(tmp_path / "run/metrics.jsonl")
    assert found.summary["final_loss"] == pytest.approx(whole.summary["final_loss"], abs=1e-6)
    for name, tensor in adapter(tmp_path / "whole").items():
        torch.testing.assert_close(adapter(tmp_path / "run")[name], tensor, rtol=0, atol=1e-7)


def test_a_half_written_checkpoint_is_not_gone_on_from(
    train: Callable, out: Path, chats: Path, tmp_path: Path
) -> None:
    options = {"max_steps": 4, "eval_steps": 1}
    with pytest.raises(KeyboardInterrupt):
        train(out, chats, tmp_path / "run", listener=Stop(4), **options)
    state = tmp_path / "run/checkpoints/checkpoint-3/trainer_state.json"
    state.write_text(state.read_text()[:20])
    assert train(out, chats, tmp_path / "run", **options).resumed == 2


def test_a_finished_run_says_so_and_is_replaced_only_when_told(
    train: Callable, out: Path, chats: Path, tmp_path: Path
) -> None:
    train(out, chats, tmp_path / "run", max_steps=1)
    written = (tmp_path / "run/metrics.jsonl").stat().st_mtime_ns
    again = train(out, chats, tmp_path / "run", max_steps=1)
    assert again.already_finished
    assert again.summary["steps"] == 1
    assert (tmp_path / "run/metrics.jsonl").stat().st_mtime_ns == written
    with pytest.raises(
        TrainError, match=r"a finished run with other settings .max_steps: 1 then, 2"
    ):
        train(out, chats, tmp_path / "run", max_steps=2)
    assert train(out, chats, tmp_path / "run", max_steps=2, overwrite=True).summary["steps"] == 2


def test_an_unfinished_run_is_not_gone_on_with_otherwise(
    train: Callable, out: Path, chats: Path, tmp_path: Path
) -> None:
    options = {"max_steps": 3, "eval_steps": 1}
    with pytest.raises(KeyboardInterrupt):
        train(out, chats, tmp_path / "run", listener=Stop(2), **options)
    with pytest.raises(
        TrainError, match=r"unfinished run with other settings .learning_rate: None"
    ):
        train(out, chats, tmp_path / "run", learning_rate=1e-3, **options)
    tiny_chat.write_chats(chats, rows=20)
    with pytest.raises(TrainError, match="unfinished run on other data"):
        train(out, chats, tmp_path / "run", **options)
    tiny_chat.write_chats(chats)
    saved = {"batch_size": 2, "gradient_accumulation": 4, "checkpointing": False}
    assert train(out, chats, tmp_path / "run", **options, **saved).resumed == 1


def test_a_folder_with_other_files_is_left_alone(
    train: Callable, out: Path, chats: Path, tmp_path: Path
) -> None:
    with pytest.raises(TrainError, match="holds files and no run"):
        train(out, chats, out, overwrite=True)
    assert (out / "config.json").is_file()


def test_a_full_precision_model_is_quantized_once(
    train: Callable, model: Path, chats: Path, tmp_path: Path
) -> None:
    options = {"cache": tmp_path / "cache", "max_steps": 1, "bits": 2, "rank": 4}
    train(model, chats, tmp_path / "one", **options)
    (made,) = (tmp_path / "cache").iterdir()
    stamp = (made / "config.json").stat().st_mtime_ns
    listener = Stop(-1)
    train(model, chats, tmp_path / "two", listener=listener, **options)
    assert [made] == list((tmp_path / "cache").iterdir())
    assert (made / "config.json").stat().st_mtime_ns == stamp
    assert listener.briefing is not None
    assert "by an earlier run" in listener.briefing.base.how
    assert json.loads((tmp_path / "two/base.json").read_text())["path"] == str(made)
    config = yaml.safe_load((tmp_path / "two/config.yaml").read_text())
    assert (config["bits"], config["model"]) == (2, str(model))


def test_a_run_is_gone_on_from_its_adapter(
    train: Callable, out: Path, chats: Path, tmp_path: Path
) -> None:
    train(out, chats, tmp_path / "one", learning_rate=1e-2)
    first = read_metrics(tmp_path / "one/metrics.jsonl")
    train(tmp_path / "one", chats, tmp_path / "two", max_steps=1)
    second = read_metrics(tmp_path / "two/metrics.jsonl")
    assert second.validation[0]["validation_loss"] == pytest.approx(
        first.summary["best_validation_loss"], abs=1e-5
    )
    assert json.loads((tmp_path / "two/base.json").read_text())["path"] == str(out)


def test_options_of_a_quantization_are_refused_for_a_packed_model(
    train: Callable, out: Path, chats: Path, tmp_path: Path
) -> None:
    with pytest.raises(TrainError, match="packed already, so bits, rank would change nothing"):
        train(out, chats, tmp_path / "run", bits=2, rank=8)


def test_a_method_that_calibrates_asks_for_its_text(
    train: Callable, model: Path, chats: Path, tmp_path: Path
) -> None:
    for more in ({}, {"memory": "8GB"}):
        with pytest.raises(TrainError, match=r"calibration=TEXT .* method=cloq .* train OUT"):
            train(model, chats, tmp_path / "run", method="cloq", **more)
    with pytest.raises(TrainError, match=r"^refine=distill: calibrates on a text of its own"):
        train(model, chats, tmp_path / "run", refine="distill")
    assert not (tmp_path / "run").exists()


def test_a_text_to_calibrate_on_is_told_from_the_training_data(
    train: Callable, model: Path, chats: Path, tmp_path: Path
) -> None:
    text = tmp_path / "text.txt"
    text.write_text("one two three four five " * 200)
    options = {"method": "cloq", "calibration": str(text), "calibration_context": 16, "bits": 2}
    train(model, chats, tmp_path / "run", max_steps=1, **options)
    settings = yaml.safe_load((tmp_path / "run/config.yaml").read_text())
    assert (settings["data"], settings["calibration"]) == (str(chats), str(text))
    packed = Path(json.loads((tmp_path / "run/base.json").read_text())["path"])
    record = json.loads((packed / "loftq.json").read_text())["layers"][0]
    assert record["tokens"] == 992
    with pytest.raises(TrainError, match="packed already, so calibration would change nothing"):
        train(packed, chats, tmp_path / "next", calibration=str(text))


@pytest.mark.parametrize("method", ["max", "best"])
def test_a_full_precision_model_is_refined_before_it_is_trained(
    method: str,
    train: Callable,
    model: Path,
    chats: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("LOFTQ_CACHE", str(tmp_path / "cache"))  # no statistics of other tests
    text = tmp_path / "text.txt"
    text.write_text("one two three four five " * 100)
    seen: list[str] = []

    class Follow(Listener):
        def calibrated(self, path: str, done: int, total: int) -> None:
            seen.append("calibrated")

        def refined(self, step: Step) -> None:
            seen.append("refined")

        def quantizing_done(self) -> None:
            seen.append("done")

    options = {"method": method, "calibration": str(text), "calibration_context": 16, "bits": 2}
    options |= {"refine": "distill", "refine_epochs": 1, "iters": 1}
    train(model, chats, tmp_path / "run", max_steps=1, listener=Follow(), **options)
    assert list(dict.fromkeys(seen)) == ["calibrated", "refined", "done"]
    packed = Path(json.loads((tmp_path / "run/base.json").read_text())["path"])
    assert len(json.loads((packed / "loftq.json").read_text())["refinement"]) == 1
    seen.clear()
    train(model, chats, tmp_path / "again", max_steps=1, listener=Follow(), **options)
    assert seen == []  # by the backbone of the first


def test_a_full_precision_model_takes_a_table_of_costs(
    train: Callable, model: Path, chats: Path, tmp_path: Path
) -> None:
    options = {"allocation": "error", "bits": 2.8, "rank": 4, "statistics": str(tmp_path / "kept")}
    with pytest.raises(ValueError, match=r"costs are not measured yet\. `loftq plan --measure`"):
        train(model, chats, tmp_path / "run", max_steps=1, **options)
    choice = loftq.plan(model, measure=True, **options).choice
    train(model, chats, tmp_path / "run", max_steps=1, **options)
    packed = Path(json.loads((tmp_path / "run/base.json").read_text())["path"])
    assert choice is not None
    record = json.loads((packed / "loftq.json").read_text())
    assert {layer["name"]: layer["format"] for layer in record["layers"]} == choice.formats


def test_an_early_stop(train: Callable, out: Path, chats: Path, tmp_path: Path) -> None:
    result = train(
        out, chats, tmp_path / "run", learning_rate=3.0, max_steps=40, eval_steps=1, early_stop=2
    )
    assert result.summary["stopped_early"]
    assert result.summary["steps"] < 40


def test_a_loss_that_is_not_a_number_stops_the_run_at_once(
    train: Callable, out: Path, chats: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from loftq.train.trainers import Watched

    original = Watched.training_step

    def broken(self: Any, *args: Any, **kwargs: Any) -> torch.Tensor:
        loss = original(self, *args, **kwargs)
        return loss * float("nan") if self.state.global_step == 2 else loss

    monkeypatch.setattr(Watched, "training_step", broken)
    with pytest.raises(TrainError, match=r"step 3: the loss is nan.*Try a lower learning_rate"):
        train(out, chats, tmp_path / "run", eval_steps=1)
    assert sorted(p.name for p in (tmp_path / "run/checkpoints").iterdir()) == [
        "checkpoint-1", "checkpoint-2",
    ]  # fmt: skip
    assert [r["step"] for r in read_metrics(tmp_path / "run/metrics.jsonl").train] == [1, 2]


def test_no_space_for_checkpoints_is_found_before_any_step(
    train: Callable, out: Path, chats: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = type("Usage", (), {"free": 10_000})
    monkeypatch.setattr("shutil.disk_usage", lambda _: usage)
    with pytest.raises(CheckpointError, match=r"no space left: .* 10000 bytes free"):
        train(out, chats, tmp_path / "run")
    assert not (tmp_path / "run/metrics.jsonl").exists()


def test_two_commands_do_not_share_a_folder(
    train: Callable, out: Path, chats: Path, tmp_path: Path
) -> None:
    class Second(Listener):
        def ready(self, briefing: Briefing) -> None:
            train(out, chats, tmp_path / "run")

    with pytest.raises(CheckpointError, match=f"process {os.getpid()} .* is writing here"):
        train(out, chats, tmp_path / "run", listener=Second())


def test_a_full_memory_says_what_was_tried(
    train: Callable, out: Path, chats: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from trl import SFTTrainer

    def full(*args: Any, **kwargs: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(SFTTrainer, "training_step", full)
    with pytest.raises(OutOfMemory) as caught:
        train(out, chats, tmp_path / "run", max_length=48)
    text = str(caught.value)
    assert re.match(r"step 1: out of memory on a batch of 4 x (\d+) = \d+ tokens", text)
    assert re.search(r"by prediction \(backbone .* GB, .*logits .* GB", text)
    assert text.count(" saves ") == 2
    monkeypatch.undo()
    assert train(out, chats, tmp_path / "run", max_length=48).summary["steps"] == 4


def test_memory_is_predicted_by_part_and_recorded(
    train: Callable, out: Path, chats: Path, preferences: Path, tmp_path: Path
) -> None:
    listener = Stop(-1)
    result = train(out, chats, tmp_path / "run", listener=listener, max_steps=1)
    assert listener.briefing is not None
    predicted = dict(listener.briefing.memory)
    assert predicted["adapters"] == 4 * listener.briefing.trainable
    assert predicted["optimizer"] == 8 * listener.briefing.trainable
    assert "reference" not in predicted
    assert result.memory["predicted"] == predicted
    assert result.memory["measured_peak"] > 0
    pairs = train(out, preferences, tmp_path / "dpo", chat_template=None, max_steps=1)
    assert pairs.memory["predicted"]["reference"] == predicted["adapters"]


def test_a_budget_chooses_what_was_left_open(
    train: Callable, model: Path, chats: Path, tmp_path: Path
) -> None:
    class Fitted(Stop):
        def fitted(self, fit: Any) -> None:
            self.fit = fit

    def run(name: str, memory: str, **options: object) -> tuple[Any, dict[str, Any]]:
        listener = Fitted(-1)
        train(
            model, chats, tmp_path / name, memory=memory, listener=listener, max_steps=1,
            max_length=None, cache=tmp_path / "cache", samples=0, **options,
        )  # fmt: skip
        config = yaml.safe_load((tmp_path / name / "config.yaml").read_text())
        return listener.fit, config

    wide, roomy = run("wide", "1GB")
    tight, narrow = run("tight", "5MB", rank=4)
    assert (roomy["bits"], roomy["rank"], roomy["checkpointing"]) == (4, 16, False)
    assert narrow["rank"] == 4
    assert narrow["batch_size"] < roomy["batch_size"]
    assert narrow["batch_size"] * narrow["gradient_accumulation"] == 8
    assert tight.peak.total <= tight.usable < wide.peak.total
    with pytest.raises(ValueError, match=r"nothing fits. The least that training this model takes"):
        run("none", "100KB")
    with pytest.raises(ValueError, match="memory 'much': not a size"):
        run("none", "much")
    assert not (tmp_path / "none").exists()


def test_an_unknown_option_names_the_nearest(out: Path, chats: Path, tmp_path: Path) -> None:
    with pytest.raises(
        ValueError, match=r"unknown option 'learningrate'. Did you mean learning_rate"
    ):
        loftq.train(out, chats, tmp_path / "run", learningrate=1)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"save_steps": 3, "eval_steps": 2}, "save_steps=3: must be a multiple of eval_steps=2"),
        ({"learning_rate": 0.0}, "learning_rate=0.0: must be positive"),
        ({"batch_size": 0}, "batch_size=0: must be at least 1"),
        ({"dtype": "int8"}, "dtype='int8' does not exist"),
        ({"optimizer": "sgd"}, "optimizer='sgd' does not exist"),
    ],
)
def test_a_value_out_of_range_is_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        TrainConfig(**options)


def test_a_configuration_survives_a_round_trip() -> None:
    config = TrainConfig(learning_rate=1e-3, max_steps=7, packing=True)
    assert TrainConfig.from_dict(config.to_dict()) == config
    with pytest.raises(ValueError, match="version 9"):
        TrainConfig.from_dict({"version": 9})


def test_steps_cover_the_rows() -> None:
    steps = TrainConfig(epochs=3, batch_size=4, gradient_accumulation=2).steps(47)
    assert (steps.in_epoch, steps.total, steps.evaluate, steps.save) == (6, 18, 3, 3)
    assert TrainConfig(epochs=0.1).steps(3).total == 1
    assert TrainConfig().steps(47, processes=2).in_epoch == 3


def test_a_command_that_fails_leaves_the_earlier_run_alone(
    out: Path, chats: Path, tmp_path: Path, train: Callable
) -> None:
    run = tmp_path / "run"
    train(out, chats, run, max_steps=1, samples=0)
    adapter = (run / "adapter" / "adapter_model.safetensors").read_bytes()
    with pytest.raises(ValueError, match="no such file"):
        train(out, tmp_path / "typo.jsonl", run, overwrite=True)
    with pytest.raises(ValueError, match="MODEL is the run itself"):
        train(run, chats, run, overwrite=True)
    assert (run / "adapter" / "adapter_model.safetensors").read_bytes() == adapter


def test_a_second_stage_has_the_chat_template_of_the_first(
    out: Path, chats: Path, tmp_path: Path, train: Callable
) -> None:
    with pytest.raises(ValueError, match="no chat template"):
        train(out, chats, tmp_path / "bare", chat_template=None)
    train(out, chats, tmp_path / "first", max_steps=1, samples=0)
    second = tmp_path / "second"
    train(tmp_path / "first", chats, second, chat_template=None, max_steps=1, samples=0)
    found = (second / "adapter" / "chat_template.jinja").read_text()
    assert found == (tmp_path / "first" / "adapter" / "chat_template.jinja").read_text()


def test_what_was_given_stays_when_a_budget_chooses(
    out: Path, chats: Path, tmp_path: Path, train: Callable
) -> None:
    given = {"gradient_accumulation": 3, "checkpointing": False}
    train(out, chats, tmp_path / "run", memory="8GB", max_steps=1, samples=0, **given)
    written = yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())
    assert {key: written[key] for key in given} == given
