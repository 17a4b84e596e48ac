"""The scripts behind the tables of quality run: each of them on a tiny model, without tuning."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

import zoo
from test_calibrated import add_tokenizer

SCRIPTS = Path(__file__).parent.parent / "benchmarks" / "quality"
LENGTH = 2048  # of a window of the protocol
LETTERS = "the quick brown fox jumps over a lazy dog and "


@pytest.mark.parametrize(
    ("script", "rows", "more"),
    [
        ("calibrated", ["lq-lora:int2-g32-dq:4", "best:int2-g32-dq:4:iters=1"], []),
        ("refined", ["fast:int2-g32-dq:4:distill:epochs=1"], ["--work", "work"]),
        ("allocation", ["error:2.8:fast", "first:2.8"], ["--method", "best", "--rank", "4"]),
    ],
)
def test_every_row_is_measured(
    script: str, rows: list[str], more: list[str], tmp_path: Path
) -> None:
    model = zoo.build("llama")
    model.config.max_position_embeddings = 2 * LENGTH
    zoo.save(model, tmp_path / "llama")
    add_tokenizer(tmp_path / "llama")
    (tmp_path / "text.txt").write_text(LETTERS * 200)
    given = [
        "--windows",
        "1",
        "--data",
        "text.txt",
        "--calibrate",
        "text.txt",
        "--choose",
        "text.txt",
        *more,
    ]
    given += ["--calibration-windows", "8", "--calibration-context", "32", "--statistics", "kept"]
    command = [sys.executable, SCRIPTS / f"{script}.py", "llama", *given, "--out", "rows.jsonl"]
    done = subprocess.run(
        [*map(str, command), "--rows", *rows],
        cwd=tmp_path, env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True,
        timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    found = [json.loads(line) for line in (tmp_path / "rows.jsonl").read_text().splitlines()]
    assert len(found) == len(rows), done.stdout
    assert all(set(row["before"]) == {"wiki", "c4", "valid"} for row in found)
