"""metrics.jsonl is read as a resumed or killed run leaves it."""

import json
import math
from pathlib import Path

from loftq.integrations.metrics import loss_unit, read_metrics
from trained_run import rows


def write(path: Path, *lines: object) -> Path:
    text = "\n".join(line if isinstance(line, str) else json.dumps(line) for line in lines)
    path.write_text(text + "\n")
    return path


def test_rows_are_told_apart(tmp_path: Path) -> None:
    metrics = read_metrics(write(tmp_path / "m", *rows()))
    assert [row["step"] for row in metrics.train] == list(range(1, 21))
    assert [row["step"] for row in metrics.validation] == [0, 5, 10, 15, 20]
    assert metrics.summary["best_step"] == 15
    assert metrics.best is not None
    assert metrics.best["step"] == 15
    assert metrics.unreadable == 0


def test_the_later_of_two_rows_of_a_step_counts(tmp_path: Path) -> None:
    again = [{"step": 2, "loss": 5.0}, {"step": 3, "loss": 4.0}, {"step": 2, "loss": 1.0}]
    metrics = read_metrics(write(tmp_path / "m", *again))
    assert [(row["step"], row["loss"]) for row in metrics.train] == [(2, 1.0), (3, 4.0)]


def test_damaged_lines_are_counted(tmp_path: Path) -> None:
    metrics = read_metrics(write(tmp_path / "m", {"step": 1, "loss": 2.0}, '{"step": 2, "lo', "7"))
    assert len(metrics.train) == 1
    assert metrics.unreadable == 2


def test_a_lost_validation_loss_is_never_the_best(tmp_path: Path) -> None:
    metrics = read_metrics(write(tmp_path / "m", '{"step": 1, "validation_loss": NaN}'))
    assert math.isnan(metrics.validation[0]["validation_loss"])
    assert metrics.best is None


def test_preferences_are_scored_by_the_pair() -> None:
    units = [loss_unit(data) for data in ({"format": "preference"}, {"format": "messages"}, {})]
    assert units == ["nats per pair", "nats per token", "nats per token"]
