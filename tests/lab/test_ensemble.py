"""Members on one backbone: they differ, and averaging them is never worse than the mean member."""

import json
from pathlib import Path

import numpy as np
import pytest

import loftq
from loftq.cli.main import main
from loftq.lab.compare.recipe import load_recipe
from loftq.lab.compare.standin import tiny
from loftq.lab.compare.standin_rows import words, write_rows
from loftq.lab.ensemble import score_ensemble, train_ensemble
from loftq.tasks import TaskError, evaluate

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
    out = capsys.readouterr().out
    for name in ("member 0", "member 1", "ensemble", "24 rows of rte (validation)"):
        assert name in out


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning")
def test_members_choose_among_answers_together(place: Path, tmp_path: Path) -> None:
    found = train_ensemble(
        place / "out", "dream", tmp_path, members=2, data=place / "data", device="cpu", **LITTLE
    )
    assert len(found.members) == 2
    alone = evaluate(tmp_path / "members/1", "dream", data=place / "data", device="cpu")
    assert alone.value == pytest.approx(found.members[1].accuracy)


def test_an_ensemble_of_one_or_of_numbers_is_refused(place: Path, tmp_path: Path) -> None:
    with pytest.raises(TaskError, match="members=1: an ensemble has at least 2"):
        train_ensemble(place / "out", "rte", tmp_path, members=1)
    with pytest.raises(TaskError, match="stsb: is a regression"):
        train_ensemble(place / "out", "stsb", tmp_path, members=2)
    assert json.loads((place / "out/loftq.json").read_text())["backbone"]
