"""The scripts behind the tables of quality run: each of them on a tiny model."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import zoo
from test_calibrated import add_tokenizer

SCRIPTS = Path(__file__).parent.parent / "benchmarks" / "quality"
LENGTH = 2048  # of a window of the protocol
LETTERS = "the quick brown fox jumps over a lazy dog and "


def make_llama(place: Path) -> None:
    """A tiny Llama that takes windows of the protocol, and a text."""
    model = zoo.build("llama")
    model.config.max_position_embeddings = 2 * LENGTH
    zoo.save(model, place / "llama")
    add_tokenizer(place / "llama")
    (place / "text.txt").write_text(LETTERS * 200)


def run(place: Path, script: str, *words: str) -> str:
    """What a script prints; it must end well."""
    done = subprocess.run(
        [sys.executable, "-W", "ignore", str(SCRIPTS / f"{script}.py"), *words],
        cwd=place, env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True,
        timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


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
    make_llama(tmp_path)
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
    said = run(tmp_path, script, "llama", *given, "--out", "rows.jsonl", "--rows", *rows)
    found = [json.loads(line) for line in (tmp_path / "rows.jsonl").read_text().splitlines()]
    assert len(found) == len(rows), said
    assert all(set(row["before"]) == {"wiki", "c4", "valid"} for row in found)


CALIBRATED = [
    "--calibrate",
    "text.txt",
    "--calibration-windows",
    "8",
    "--calibration-context",
    "32",
]


def test_processes_share_the_rows_of_a_table_and_a_second_call_finds_them(tmp_path: Path) -> None:
    make_llama(tmp_path)
    given = ["shared", "llama", *CALIBRATED, "--data", "text.txt", "--windows", "1"]
    given += [
        "--methods",
        "qlora",
        "loftq-paper",
        "max",
        "--formats",
        "int2-g32-dq",
        "--ranks",
        "4",
    ]
    table = run(tmp_path, "all_methods", *given, "--processes", "2")
    assert all(f"| {row} | 4 |" in table for row in ("qlora | int2-g32-dq", "max | int2-g32-dq"))
    assert "loftq-paper | nf2-g32-dq" in table
    minutes = float(re.search(r"^([\d.]+) minutes in all", table, re.M)[1])
    rows = [json.loads(path.read_text()) for path in (tmp_path / "shared" / "rows").iterdir()]
    assert minutes == pytest.approx(sum(row["job_s"] for row in rows) / 60, abs=0.06)
    rows = {path: path.read_bytes() for path in (tmp_path / "shared" / "rows").iterdir()}
    assert len(rows) == 6  # with the original model, the statistics and the settings
    assert not run(tmp_path, "all_methods", *given, "--ranks", "4")  # nothing left to say
    assert {path: path.read_bytes() for path in rows} == rows


def test_a_layer_that_is_tuned_keeps_its_bias(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(SCRIPTS)
    from tuning import Start, replaced

    model = torch.nn.Sequential(torch.nn.Linear(6, 4))
    start = Start(model[0].weight.data, torch.randn(2, 6), torch.zeros(4, 2))
    x = torch.randn(3, 6)
    torch.testing.assert_close(replaced(model, {"0": start})(x), model(x))


def test_a_row_says_how_its_start_is_refined(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(SCRIPTS)
    from all_methods import refinement_of

    assert refinement_of("fast:int2-g64-dq:16:damping=0.1") is None
    assert refinement_of("max:int2-g64-dq:16") == "max:int2-g64-dq:16:distill"
    row = "best:int2-g64-dq:16:refinement=distill:epochs=1:rate=7e-4"
    assert refinement_of(row) == "best:int2-g64-dq:16:distill:epochs=1:rate=7e-4"
    with pytest.raises(ValueError, match=r"a refined row takes no blend\. It takes epochs, rate"):
        refinement_of("best:int2-g64-dq:16:refinement=distill:blend=0.5")


def test_encoders_are_scored_by_what_becomes_of_their_embeddings(tmp_path: Path) -> None:
    zoo.save(zoo.build_base("mpnet"), tmp_path / "mpnet")
    add_tokenizer(tmp_path / "mpnet")
    (tmp_path / "text.txt").write_text(LETTERS * 20)
    pairs = [{"sentence1": LETTERS[k:], "sentence2": LETTERS[:9], "label": k} for k in range(9)]
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
    given = ["shared", "mpnet", *CALIBRATED, "--pairs", "pairs.jsonl", "--ranks", "4"]
    given += ["--methods", "qlora", "fast", "--formats", "int2-g32-dq", "--processes", "2"]
    run(tmp_path, "all_methods", *given)
    rows = tmp_path / "shared" / "rows"
    scores = {
        name: json.loads((rows / f"{name}.json").read_text())["before"]
        for name in ("reference", "qlora_int2-g32-dq_4", "fast_int2-g32-dq_4")
    }
    assert [scores["reference"]["moved"], len(scores["reference"])] == [0.0, 2]
    assert all(scores[name]["moved"] > 0 for name in scores if name != "reference")


def test_rows_of_other_settings_are_not_taken_for_those_asked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(SCRIPTS)
    from sharing import Job, Rows, share

    rows = Rows(tmp_path)
    rows.claim({"windows": 40, "data": "a.txt"})
    rows.claim({"windows": 40, "data": "a.txt"})
    with pytest.raises(ValueError, match=r"made with windows=40\. Ask for the same"):
        rows.claim({"windows": 20, "data": "a.txt"})

    def fail() -> dict:
        raise RuntimeError("no memory")

    jobs = [Job(name="a:b", work=fail), Job(name="c", work=dict, after="a:b")]
    share(rows, [*jobs, Job(name="d", work=dict)], late=lambda: False)
    assert rows.find("a:b")["failed"] == "RuntimeError: no memory"
    assert rows.find("c") is None
    assert rows.succeeded("d")
    rows.forget_failures()
    assert rows.find("a:b") is None
