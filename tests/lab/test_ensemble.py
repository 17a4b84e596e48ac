"""Members on one backbone: they differ, and averaging them is never worse than the mean member."""

import json
import math
from contextlib import ExitStack
from pathlib import Path

import numpy as np
import pytest

import loftq
import tiny_tasks
from loftq.cli.main import main
from loftq.integrations.causal import open_causal
from loftq.integrations.members import MembersError
from loftq.lab.compare.recipe import load_recipe
from loftq.lab.compare.standin import tiny
from loftq.lab.compare.standin_rows import words, write_rows
from loftq.lab.ensemble import Follower, score_ensemble, train_ensemble
from loftq.lab.ensemble.result import result_of
from loftq.lab.locks import Locks
from loftq.tasks import TaskError, evaluate, train_task

pytest.importorskip("datasets")
pytest.importorskip("sklearn")
LITTLE = {
    "max_steps": 6, "eval_steps": 3, "batch_size": 4, "gradient_accumulation": 1,
    "max_length": 48, "holdout": 0.4, "samples": 0, "dtype": "fp32", "learning_rate": 1e-2,
}  # fmt: skip


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A packed tiny encoder and its data."""
    folder = tmp_path_factory.mktemp("ensemble")
    model = tiny(load_recipe("glue-mpnet").architecture, folder / "model", words())
    loftq.quantize(model, folder / "out", bits=2, rank=4, device="cpu")
    write_rows(["rte", "mrpc", "dream", "stsb"], folder / "data")
    return folder


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning")
def test_members_differ_and_their_average_is_not_worse(place: Path, tmp_path: Path) -> None:
    def run() -> object:
        return train_ensemble(
            place / "out", "rte", tmp_path, members=2, data=place / "data", device="cpu", **LITTLE
        )

    found = run()
    assert found.rows == 24
    assert found.divergence > 0
    assert found.ensemble.nll <= np.mean([member.nll for member in found.members])
    assert found.ensemble.ece_interval[0] <= found.ensemble.ece_interval[1]
    assert sum(bar["rows"] for bar in found.diagram) == 24
    made = (tmp_path / "members/0/task.json").stat().st_mtime_ns
    assert run() == found
    assert (tmp_path / "members/0/task.json").stat().st_mtime_ns == made
    one = np.array([probabilities_of(tmp_path / f"members/{seed}") for seed in (0, 1)])
    runs = [tmp_path / "members/0", tmp_path / "members/1"]
    together = evaluate(tmp_path, "rte", data=place / "data", device="cpu").predictions
    averaged = [row["probabilities"] for row in together["validation"]]
    assert np.allclose(averaged, one.mean(0), atol=1e-4)
    assert (tmp_path / "reliability.svg").read_text().startswith("<?xml")
    foreign = score_ensemble(runs, "rte", data=place / "data", device="cpu", outside=["mrpc"])
    assert 0 <= foreign.outside[0].entropy <= 1
    assert foreign.ensemble == found.ensemble


def probabilities_of(run: Path) -> list[list[float]]:
    """Those that a member predicted alone, at the end of its training."""
    lines = (run / "predictions-validation.jsonl").read_text().splitlines()
    return [json.loads(line)["prediction"]["probabilities"] for line in lines]


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning")
def test_the_command_shows_every_member_and_the_ensemble(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("LOFTQ_DATA", str(place / "data"))
    keys = [f"{key}={value}" for key, value in {**LITTLE, "max_steps": 1, "eval_steps": 1}.items()]
    words = ["lab", "ensemble", place / "out", "--task", "rte", "--members", 2, "-o", tmp_path]
    assert main([str(word) for word in [*words, "--device", "cpu", *keys]]) == 0
    out, told = capsys.readouterr()
    assert "[2 of 2] members/1" in told
    assert "trained in" in told
    for name in ("member 0", "member 1", "ensemble", "24 rows of rte (validation)"):
        assert name in out


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning")
def test_the_command_shows_the_metrics_of_a_task_without_classes(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    write_rows(["xquad-en"], tmp_path / "data")
    monkeypatch.setenv("LOFTQ_DATA", str(tmp_path / "data"))
    keys = {**LITTLE, "max_steps": 1, "eval_steps": 1, "max_length": 64, "train_rows": 8}
    words = ["lab", "ensemble", place / "out", "--task", "xquad-en", "--members", 2]
    words += ["--device", "cpu", "-o", tmp_path / "all"]
    words += [f"{key}={value}" for key, value in keys.items()]
    assert main([str(word) for word in words]) == 0, capsys.readouterr().err
    out = capsys.readouterr().out
    head = next(line for line in out.splitlines() if "xquad-en, test" in line)
    assert head.split()[2:4] == ["f1", "exact_match"]
    assert [line.split()[0] for line in out.splitlines() if " to " in line] == [
        "member", "member", "ensemble",
    ]  # fmt: skip
    assert "reliability.svg" not in out


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning")
def test_members_choose_among_answers_together(place: Path, tmp_path: Path) -> None:
    found = train_ensemble(
        place / "out", "dream", tmp_path, members=2, data=place / "data", device="cpu", **LITTLE
    )
    assert len(found.members) == 2
    alone = evaluate(tmp_path / "members/1", "dream", data=place / "data", device="cpu")
    assert alone.value == pytest.approx(found.members[1].accuracy)


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning")
def test_an_interrupted_ensemble_says_what_is_missing_and_goes_on(
    place: Path, tmp_path: Path
) -> None:
    short = {**LITTLE, "max_steps": 1, "eval_steps": 1, "data": place / "data", "device": "cpu"}

    def interrupt(seed: int, number: int, total: int) -> None:
        if number == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train_ensemble(
            place / "out", "rte", tmp_path, members=2, follower=Follower(begun=interrupt), **short
        )
    unfinished = pytest.raises(MembersError, match=r"1 of 2 members are trained\. .* it goes on")
    with unfinished:
        evaluate(tmp_path, "rte", data=place / "data", device="cpu")
    with unfinished:
        open_causal(tmp_path, device="cpu")
    ended = []
    train_ensemble(
        place / "out", "rte", tmp_path, members=2, follower=Follower(ended=ended.append), **short
    )
    assert [result.already_finished for result in ended] == [True, False]
    assert all(result.summary["seconds"] > 0 for result in ended)


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning")
def test_a_member_that_another_process_trains_comes_last(place: Path, tmp_path: Path) -> None:
    begun: list[int] = []
    short = {**LITTLE, "max_steps": 1, "eval_steps": 1, "data": place / "data", "device": "cpu"}
    with ExitStack() as other:
        assert other.enter_context(Locks(tmp_path).free("0"))
        follower = Follower(
            begun=lambda seed, place, total: begun.append(seed),
            ended=lambda result: other.close(),
        )
        found = train_ensemble(
            place / "out", "rte", tmp_path, members=3, follower=follower, **short
        )
    assert begun == [1, 2, 0]
    assert len(found.members) == 3


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning")
@pytest.mark.parametrize("task", ["gsm8k-loss", "wikitext2-small"])
def test_the_mean_probability_of_a_token_is_likelier_than_the_mean_member_says(
    task: str, tmp_path: Path
) -> None:
    model = tiny_tasks.write_model(tmp_path / "model", "llama")
    loftq.quantize(model, tmp_path / "out", bits=2, rank=2, device="cpu")
    data = tiny_tasks.write_data(tmp_path / "data")
    own = {
        "wikitext2-small": {"max_length": 32},
        "gsm8k-loss": {"max_length": None, "eval_rows": 4},
    }
    found = train_ensemble(
        tmp_path / "out", task, tmp_path / "all", members=2, data=data, device="cpu",
        **{**LITTLE, "max_steps": 4, **own[task]},
    )  # fmt: skip

    def nats(metrics: dict) -> float:
        value = metrics["test"][found.primary]["value"]
        return value if task == "gsm8k-loss" else math.log(value)

    members = [nats(metrics) for metrics in found.members]
    assert abs(members[0] - members[1]) > 1e-6
    assert nats(found.ensemble) <= np.mean(members) + 1e-6
    record = json.loads((tmp_path / "all/ensemble.json").read_text())
    assert record["scores"]["ensemble"] == json.loads(json.dumps(found.ensemble))
    assert not (tmp_path / "all/reliability.svg").exists()
    with pytest.raises(TaskError, match="without probabilities of classes"):
        train_ensemble(tmp_path / "out", task, tmp_path / "x", members=2, outside=("rte",))


def test_members_that_rule_the_label_out_are_scored_too() -> None:
    sure = np.array([[[0.0, 1.0]], [[1.9e-12, 1 - 1.9e-12]]])
    found = result_of("rte", "validation", sure, np.array([0]), {})
    assert found.ensemble.nll <= np.mean([member.nll for member in found.members]) + 1e-6
    assert math.isfinite(found.ensemble.nll)


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning")
def test_numbers_are_not_averaged_as_if_they_were_probabilities(
    place: Path, tmp_path: Path
) -> None:
    short = {**LITTLE, "max_steps": 1, "eval_steps": 1}
    train_task(place / "out", "stsb", tmp_path / "run", data=place / "data", device="cpu", **short)
    (tmp_path / "ensemble.json").write_text(json.dumps({"members": ["run", "run"]}))
    with pytest.raises(MembersError, match="predicts a number; probabilities are averaged"):
        evaluate(tmp_path, "stsb", data=place / "data", device="cpu")


def test_what_cannot_be_averaged_is_refused_before_anything_is_trained(
    place: Path, tmp_path: Path
) -> None:
    with pytest.raises(TaskError, match="members=1: an ensemble has at least 2"):
        train_ensemble(place / "out", "rte", tmp_path, members=1)
    with pytest.raises(TaskError, match="stsb: predicts a number"):
        train_ensemble(place / "out", "stsb", tmp_path, members=2)
    with pytest.raises(TaskError, match=r"not an output of `loftq quantize`"):
        train_ensemble(place / "model", "rte", tmp_path, members=2)
    bart = tiny_tasks.write_model(tmp_path / "bart", "bart")
    loftq.quantize(bart, tmp_path / "packed", bits=2, rank=2, device="cpu")
    with pytest.raises(TaskError, match="an encoder-decoder"):
        train_ensemble(tmp_path / "packed", "scitldr", tmp_path / "x", members=2)
    assert not (tmp_path / "members").exists()
