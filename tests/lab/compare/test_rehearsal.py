"""Every packaged comparison trains a step of each task, on a tiny model of its architecture."""

import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import yaml

from loftq.lab.compare.cells import cells
from loftq.lab.compare.matrix import write_tables
from loftq.lab.compare.recipe import known_recipes, load_recipe, read_recipe
from loftq.lab.compare.rehearsal import chosen, rehearse
from loftq.lab.compare.standin import tiny
from loftq.lab.compare.standin_rows import words, write_rows
from loftq.lab.compare.store import RowStore

pytest.importorskip("datasets")
pytest.importorskip("sklearn")

SUMMARIES = ("bart-summarization", "smollm2-scitldr")


@pytest.mark.parametrize("name", known_recipes())
@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning")
def test_a_packaged_comparison_trains_a_step(name: str, tmp_path: Path) -> None:
    if name in SUMMARIES:
        pytest.importorskip("rouge_score")
    recipe = load_recipe(name)
    steps = rehearse(recipe, work=tmp_path)
    assert {step.cell for step in steps} == {cell.name for cell in chosen(recipe)}
    found = chosen(recipe)
    assert {cell.task for cell in found} == set(recipe.tasks)
    assert {cell.arm.name for cell in found} == {cell.arm.name for cell in cells(recipe)}
    for step in steps:
        assert step.metrics
        assert all(math.isfinite(value) for value in step.metrics.values())


RECIPE = {
    "tasks": {"rte": {}, "stsb": {}},
    "methods": ["qlora", "loftq", "lora16", "full"],
    "formats": ["nf2-g64"],
    "ranks": [4],
    "seeds": 2,
    "training": {
        "max_steps": 6, "eval_steps": 2, "batch_size": 4, "gradient_accumulation": 1,
        "max_length": 48, "holdout": 0.4, "samples": 0, "dtype": "fp32", "learning_rate": 1e-3,
    },
}  # fmt: skip


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model, its data and a comparison of it."""
    folder = tmp_path_factory.mktemp("kill")
    architecture = load_recipe("glue-mpnet").architecture
    model = tiny(architecture, folder / "model", words())
    write_rows(["rte", "stsb"], folder / "data")
    values = {"model": str(model), **RECIPE}
    text = "# A comparison for tests.\n" + yaml.safe_dump(values, sort_keys=False)
    (folder / "recipe.yaml").write_text(text)
    return folder


def start(place: Path, output: Path) -> subprocess.Popen[bytes]:
    """`loftq lab compare` as a process of its own."""
    words = ["lab", "compare", place / "recipe.yaml", "-o", output, "--device", "cpu"]
    return subprocess.Popen(
        [sys.executable, "-W", "ignore", "-m", "loftq", *map(str, words)],
        env={**os.environ, "LOFTQ_DATA": str(place / "data"), "HF_HUB_OFFLINE": "1"},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )


def scores(place: Path, output: Path) -> dict[str, Any]:
    """Cell -> what decides the table: metrics, bytes, bits."""
    recipe = read_recipe("recipe", (place / "recipe.yaml").read_text())
    found = write_tables(recipe, output)
    assert all(row.status == "done" for row in found.rows), [row.error for row in found.rows]
    return {row.cell: (row.metrics, row.bytes, row.bits_per_weight) for row in found.rows}


def test_killed_and_run_again_it_ends_in_the_same_table(place: Path, tmp_path: Path) -> None:
    assert start(place, tmp_path / "whole").wait() == 0
    expected = scores(place, tmp_path / "whole")
    assert len(expected) == 2 * 4 * 2
    killed = tmp_path / "killed"
    for rows in (2, 5):
        process = start(place, killed)
        # Once in the middle of a cell that has saved a checkpoint, wherever the others are.
        while len(list(killed.glob("rows/*.json"))) < rows or not _in_training(killed):
            assert process.poll() is None, "it ended before it could be killed"
            time.sleep(0.01)
        process.send_signal(signal.SIGKILL)
        process.wait()
    kept = {path: path.stat().st_mtime_ns for path in killed.glob("rows/*.json")}
    assert 5 <= len(kept) < len(expected)
    helpers = [start(place, killed) for _ in range(2)]  # two at once share what is left
    assert [process.wait() for process in helpers] == [0, 0]
    assert scores(place, killed) == expected
    assert all(path.stat().st_mtime_ns == made for path, made in kept.items())
    assert not list(killed.glob("runs/*/checkpoints"))


def _in_training(output: Path) -> bool:
    return any(output.glob("runs/*/checkpoints/checkpoint-*"))


def test_a_task_without_rows_fails_in_its_cells_alone(place: Path, tmp_path: Path) -> None:
    text = (place / "recipe.yaml").read_text()
    text = text.replace("stsb: {}", "cola: {}").replace("seeds: 2", "seeds: 1")
    (tmp_path / "recipe.yaml").write_text(text)
    (tmp_path / "data").symlink_to(place / "data")
    assert start(tmp_path, tmp_path / "out").wait() == 0
    rows = {(row.task, row.method): row for row in RowStore(tmp_path / "out/rows")}
    assert {row.status for (task, _), row in rows.items() if task == "rte"} == {"done"}
    lost = rows["cola", "qlora"]
    assert lost.status == "failed"
    assert "cola" in str(lost.error)
    assert "is not there" in str(lost.error)
