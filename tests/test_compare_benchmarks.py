"""The script behind the tables of ensembles runs: a tiny encoder, members in two processes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from loftq.lab.compare.recipe import load_recipe
from loftq.lab.compare.standin import tiny
from loftq.lab.compare.standin_rows import words, write_rows

for package in ("datasets", "sklearn"):
    pytest.importorskip(package)

SCRIPT = Path(__file__).parent.parent / "benchmarks" / "compare" / "ensemble.py"
KEYS = ["batch_size=4", "max_length=48", "holdout=0.4", "samples=0", "dtype=fp32", "eval_rows=10"]


def run(place: Path, steps: int, seconds: int) -> list[dict]:
    """Rows of three members on MRPC."""
    done = subprocess.run(
        [sys.executable, "-W", "ignore", SCRIPT, "--encoder", "model", "--data", "data", "--work",
         f"work-{steps}", "--tasks", "mrpc", "--members", "3", "--processes", "2", "--device",
         "cpu", "--seconds", str(seconds), "--keys", f"max_steps={steps}", "eval_steps=2", *KEYS],
        cwd=place, env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True,
        timeout=200,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    rows = (place / f"work-{steps}" / "rows.jsonl").read_text()
    return [json.loads(line) for line in rows.splitlines()]


def test_members_are_trained_side_by_side_and_scored_or_said_to_be_missing(tmp_path: Path) -> None:
    tiny(load_recipe("glue-mpnet").architecture, tmp_path / "model", words())
    write_rows(["mrpc", "rte"], tmp_path / "data")
    mean, all_of_them, one, together = run(tmp_path, 2, 190)
    assert (mean["rows"], all_of_them["members"]) == (10, 3)
    assert all_of_them["nll"] <= mean["nll"]
    assert together["mb"] > one["mb"]
    late, none = run(tmp_path, 4, 1)
    assert late == {"part": "mrpc", "trained": 0, "steps": [0, 0, 0]}
    assert none["missing"] == "no time for two members"
