"""`loftq train --task` and `loftq eval TASK`, as a user types them."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest

import tiny_tasks

for package in ("sklearn", "scipy", "rouge_score"):
    pytest.importorskip(package)

SHORT = ("max_steps=2", "batch_size=4", "samples=1", "report=false", "holdout=0.2", "--rank", 2)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`data`, and tiny models `bert` and `llama`."""
    folder = tmp_path_factory.mktemp("tasks")
    tiny_tasks.write_data(folder / "data")
    for name in ("bert", "llama"):
        tiny_tasks.write_model(folder / name, name)
    return folder


def test_a_task_is_trained_and_scored(loftq: Callable, place: Path, tmp_path: Path) -> None:
    words = (
        "train",
        place / "bert",
        "--task",
        "rte",
        "--data",
        place / "data",
        "--bits",
        2,
        *SHORT,
    )
    words += ("-o", tmp_path / "run", f"cache={tmp_path / 'cache'}")
    answer = loftq(*words)
    assert answer.code == 0, answer.err
    assert "task RTE" in answer.out
    assert "validation loss 0." in answer.out
    assert ", accuracy 0." in answer.out
    assert "95 % interval" in answer.out
    assert f"loftq eval rte {tmp_path / 'run'}" in answer.out
    again = loftq(*words, "--json").json
    assert again["already_finished"]
    scored = loftq("eval", "rte", tmp_path / "run", "--data", place / "data", "--json", "-o",
                   tmp_path / "said").json  # fmt: skip
    assert scored["value"] == pytest.approx(again["value"])
    assert scored["metrics"]["validation"]["accuracy"]["rows"] == 12
    lines = (tmp_path / "said/predictions-validation.jsonl").read_text().splitlines()
    assert len(lines) == 12
    table = loftq("eval", "rte", tmp_path / "run", "--data", place / "data", "--limit", 6)
    assert "(wilson)" in table.out
    assert "adapter adapter, float32 on cpu" in table.out


def test_a_long_scoring_says_in_a_log_how_far_it_is(
    loftq: Callable, place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("loftq.cli.train_screen.PATIENCE", -1)
    words = ("train", place / "bert", "--task", "rte", "--data", place / "data", "--bits", 2)
    answer = loftq(*words, *SHORT, "-o", tmp_path / "run", f"cache={tmp_path / 'cache'}")
    assert "step 0: scoring, 8 of 8 rows" in answer.out
    assert "step 2: scoring, 12 of 12 rows" in answer.out


def test_a_recipe_names_the_task_and_a_baseline(
    loftq: Callable, place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LOFTQ_DATA", str(place / "data"))
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("task: gsm8k-loss\nmethod: lora16\nmax_steps: 2\nrank: 2\nbatch_size: 2\n")
    words = ("train", place / "llama", "--config", recipe, "-o", tmp_path / "run", "--json",
             "checkpointing=false", "samples=0", "report=false")  # fmt: skip
    answer = loftq(*words)
    assert answer.code == 0, answer.err
    assert set(answer.json["metrics"]["test"]) == {"answer_loss"}
    assert json.loads((tmp_path / "run/base.json").read_text())["baseline"] == "lora16"
    plain = loftq("eval", "gsm8k-loss", place / "llama", "--json", "batch_size=4").json
    assert plain["adapter"] == "none"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("train", "bert", "--task", "rtee"), "no task 'rtee'. Did you mean rte?"),
        (("train", "bert"), "give the training data with --data FILE, or a --task"),
        (
            ("train", "bert", "--task", "rte", "--memory", "8GB"),
            "memory: has no meaning with --task",
        ),
        (("train", "bert", "--task", "rte", "packing=true"), "unknown option 'packing'"),
        (("lab", "compare", "glue-mpnet", "tasks=cola"), "tasks is a flag: --tasks cola."),
        (("lab", "ensemble", "bert", "--task", "rte", "members=3"), "is a flag: --members 3."),
        (("train", "bert", "--task", "sst2"), "glue/sst2/train is not there"),
        (("eval", "rtee", "bert"), "No such command 'rtee'. Did you mean 'rte'?"),
        (("eval", "mnli", "llama"), "has no head for mnli"),
        (("eval", "rte", "bert", "--split", "dev"), "rte: no split 'dev'"),
    ],
)
def test_mistakes_are_one_clear_error(
    loftq: Callable, place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    words: tuple[str, ...], message: str,
) -> None:  # fmt: skip
    monkeypatch.setenv("LOFTQ_DATA", str(place / "data"))
    named = [place / word if word in ("bert", "llama") else word for word in words]
    more = ("-o", tmp_path / "run") if words[0] in ("train", "lab") else ()
    answer = loftq(*named, *more)
    assert answer.code in (1, 2)
    assert message in answer.err


def test_the_protocols_are_told_apart(loftq: Callable, place: Path) -> None:
    text = place / "data/wikitext2/wiki.test.raw.gz"
    found = {
        name: loftq("eval", "ppl", place / "llama", "--data", text, "--context", 32, "--json",
                    "--protocol", name).json
        for name in ("gptq", "paper", "word")
    }  # fmt: skip
    assert all(row["protocol"] == name for name, row in found.items())
    assert found["word"]["units"] < found["word"]["tokens"]
    assert len({row["tokens"] for row in found.values()}) == 3
    shown = loftq(
        "eval", "ppl", place / "llama", "--data", text, "--context", 32, "--protocol", "word"
    )
    assert "nats a word" in shown.out
    wrong = loftq("eval", "ppl", place / "llama", "--data", text, "--protocol", "c4")
    assert "choose one of gptq, paper, word" in wrong.err
