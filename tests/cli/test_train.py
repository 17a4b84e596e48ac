"""`loftq train`: what it says before, while and after, and what it refuses."""

import json
import os
import pty
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

import exported
import tiny_chat
import trained_run
from loftq.cli.train import way_out
from loftq.integrations.metrics import read_metrics

pytest.importorskip("trl")

SMALL = ("max_length=48", "chat_template=chatml", "sample_tokens=4", "max_steps=4")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """model, chats.jsonl, preferences.jsonl and a cache of backbones."""
    made = tmp_path_factory.mktemp("cli-train")
    tiny_chat.write_model(made / "model")
    tiny_chat.write_chats(made / "chats.jsonl")
    tiny_chat.write_preferences(made / "preferences.jsonl")
    return made


@pytest.fixture
def train(loftq: Callable, folder: Path, tmp_path: Path) -> Callable:
    """A short run into tmp_path/run."""

    def run(*words: object, data: str = "chats.jsonl") -> object:
        small = [
            word
            for word in SMALL
            if not any(str(w).startswith(word.split("=")[0] + "=") for w in words)
        ]
        base = ["train", folder / "model", "--data", folder / data, "-o", tmp_path / "run"]
        return loftq(*base, "--rank", 4, f"cache={folder / 'cache'}", *small, *words)

    return run


def test_everything_is_said_before_the_first_step(
    train: Callable, folder: Path, tmp_path: Path
) -> None:
    answer = train("--overwrite", "report=false")
    assert answer.code == 0
    before = answer.out.split("step 0: validation loss")[0]
    first = {line.split()[0]: line for line in before.splitlines() if line[:1].strip()}
    assert "format messages, 24 rows" in first["data"]
    assert "23 to train, 1 row held out" in first["rows"]
    assert "are learnt" in first["tokens"]
    assert "0 cut, 0 left out" in first["tokens"]
    assert "quantized" in first["base"]
    assert "weights in float32, learning rate 0.0002" in first["adapter"]
    assert "4 of 4 x 2 rows" in first["steps"]
    assert "fp32 on cpu" in first["compute"]
    assert "an epoch" in first["time"]
    assert "\nnote     supervised fine-tuning" in before
    example = before.split("is only read):\n")[1].splitlines()[0]
    learnt = example.split("assistant")[1]
    assert learnt.startswith("[")
    assert learnt.endswith("<|im_end|>]")
    assert "[" not in example.split("assistant")[0]


def test_what_follows_is_sparse_and_ends_with_the_next_commands(
    train: Callable, tmp_path: Path
) -> None:
    answer = train("--overwrite")
    steps = [line for line in answer.out.splitlines() if line.startswith("step ")]
    assert any("tokens/s" in line and "left, peak" in line for line in steps)
    assert "step 4: validation loss" in answer.out
    assert len(re.findall(r"^an epoch takes .*, measured$", answer.out, re.MULTILINE)) == 1
    for name in ("prompt", "reference", "before", "after"):
        assert f"\n{name} " in answer.out
    assert "4 steps in" in answer.out
    assert f"report  {tmp_path / 'run/report.html'}" in answer.out
    assert f"loftq chat {tmp_path / 'run'}" in answer.out
    assert f"loftq export {tmp_path / 'run'} --to dense" in answer.out  # its groups are not whole
    assert "\x1b" not in answer.out + answer.err
    assert "{'loss'" not in answer.out  # what transformers would print


@pytest.mark.parametrize(
    ("name", "flag"),
    [
        ("nf4-g64-dq", "--for vllm"),
        ("iq4nl-g32-f16", "--for llama.cpp"),
        ("nf2-g64-dq", "--to dense"),
    ],
)
def test_the_next_command_is_one_that_the_format_admits(
    name: str, flag: str, tmp_path: Path
) -> None:
    out = exported.pack(exported.write_model(tmp_path / "model"), tmp_path / "out", format=name)
    assert way_out(trained_run.write_run(tmp_path / "run", out)) == flag


def test_the_same_command_again_says_that_it_is_done(train: Callable, tmp_path: Path) -> None:
    assert train().code == 0
    rows = tmp_path / "run" / "metrics.jsonl"
    *others, last = rows.read_text().splitlines()
    summary = json.loads(last)["summary"]
    summary["graphs"] = {"captured": 2, "replayed": 5, "eager": 3}  # as a GPU would write it
    rows.write_text("\n".join([*others, json.dumps({"summary": summary})]) + "\n")
    again = train()
    assert again.code == 0
    assert "finished before with these settings; --overwrite trains again" in again.out
    assert "5 of 8 batches from 2 graphs" in again.out
    other = train("learning_rate=1e-3")
    assert other.code == 1
    assert "learning_rate: None then, 0.001 now" in other.err
    assert len(other.err.splitlines()) == 1


def test_json_is_one_object(train: Callable, tmp_path: Path) -> None:
    answer = train("--json", "report=false")
    assert answer.json["summary"]["steps"] == 4
    assert answer.json["adapter"] == str(tmp_path / "run/adapter")
    assert answer.json["memory"]["measured_peak"] > 0
    assert answer.json["report"] is None
    assert answer.json["already_finished"] is False


def test_on_a_terminal_learnt_tokens_are_coloured_and_progress_is_a_bar(
    folder: Path, tmp_path: Path
) -> None:
    command = [sys.executable, "-m", "loftq", "train", str(folder / "model"), "--data"]
    command += [str(folder / "chats.jsonl"), "-o", str(tmp_path / "run"), "--rank", "4"]
    command += [f"cache={folder / 'cache'}", "report=false", *SMALL]
    leader, follower = pty.openpty()
    environment = {**os.environ, "COLUMNS": "140", "TERM": "xterm-256color"}
    log = tmp_path / "terminal"
    reader = subprocess.Popen(["cat"], stdin=leader, stdout=log.open("wb"))
    done = subprocess.run(command, stdout=follower, stderr=follower, env=environment)
    os.close(follower)
    os.close(leader)
    reader.wait(timeout=30)
    shown = log.read_text(errors="replace")
    assert done.returncode == 0, shown
    assert "green is learnt" in shown
    assert "\x1b[32m" in shown
    assert "steps" in shown
    assert "tokens/s" in shown


def test_a_file_a_pair_and_a_flag_reach_the_record(
    loftq: Callable, folder: Path, tmp_path: Path
) -> None:
    values = {"data": str(folder / "chats.jsonl"), "bits": 2, "epochs": 1, "seed": 3}
    (tmp_path / "c.yaml").write_text(yaml.safe_dump(values))
    answer = loftq(
        "train", folder / "model", "--config", tmp_path / "c.yaml", "-o", tmp_path / "run",
        "--rank", 4, "--seed", 5, f"cache={folder / 'cache'}", "data_format=messages",
        "report=false", *SMALL,
    )  # fmt: skip
    assert answer.code == 0
    config = yaml.safe_load((tmp_path / "run/config.yaml").read_text())
    assert (config["bits"], config["rank"], config["epochs"], config["seed"]) == (2, 4, 1.0, 5)
    assert config["data_format"] == "messages"
    again = loftq(
        "train", folder / "model", "--config", tmp_path / "run/config.yaml", "-o",
        tmp_path / "again", f"cache={folder / 'cache'}", "report=false",
    )  # fmt: skip
    assert again.code == 0
    losses = [
        read_metrics(tmp_path / name / "metrics.jsonl").summary["final_loss"]
        for name in ("run", "again")
    ]
    assert losses[0] == losses[1]


def test_preferences_choose_another_method_and_say_so(train: Callable) -> None:
    answer = train("chat_template=none", "report=false", data="preferences.jsonl")
    assert answer.code == 0
    assert "direct preference optimization" in answer.out
    assert "step 0: validation loss 0.6931" in answer.out


def test_mistakes_are_one_message(loftq: Callable, folder: Path, tmp_path: Path) -> None:
    base = ["train", folder / "model", "-o", tmp_path / "run"]
    data = ["--data", folder / "chats.jsonl"]
    answer = loftq(*base)
    assert answer.code == 2
    assert "give the training data with --data" in answer.err
    answer = loftq(*base, *data, "learning-rat=1")
    assert answer.code == 2
    assert "Did you mean learning_rate?" in answer.err
    answer = loftq(*base, *data, "epochs=many")
    assert answer.code == 1
    assert answer.err == "error: epochs=many: expected a number.\n"
    answer = loftq(*base, *data)
    assert answer.code == 1
    assert "chat_template" in answer.err
    assert not (tmp_path / "run/config.yaml").exists()


def test_a_bad_row_is_found_before_the_model_is_quantized(
    loftq: Callable, folder: Path, tmp_path: Path
) -> None:
    bad = tmp_path / "bad.jsonl"
    bad.write_text((folder / "chats.jsonl").read_text() + "{broken\n")
    answer = loftq(
        "train", folder / "model", "--data", bad, "-o", tmp_path / "run", *SMALL,
        f"cache={tmp_path / 'cache'}",
    )  # fmt: skip
    assert answer.code == 1
    assert "line 25" in answer.err
    assert not (tmp_path / "cache").exists()


def test_recipes_are_listed_and_copied(loftq: Callable, tmp_path: Path) -> None:
    assert "chat-4bit" in loftq("lab", "recipes").out
    answer = loftq("lab", "recipes", "dpo", "-o", tmp_path, "--json")
    assert answer.json["copied"] == str(tmp_path / "dpo.yaml")
    assert "beta: 0.1" in (tmp_path / "dpo.yaml").read_text()
    assert json.loads(json.dumps(answer.json["recipes"]))["dpo"].startswith("Learn from pairs")
