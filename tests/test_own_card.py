"""benchmarks/own_card.py: what runs on a card of a size; parts that end badly."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent.parent / "benchmarks"))

import own_card
from own_card import Part, parts, run


def test_a_small_card_gets_fewer_layers_and_no_dense_training(tmp_path: Path) -> None:
    products, decoding = parts(6, 10, tmp_path)
    assert products.script == "ops/bench_linear.py"
    assert decoding.arguments[1] == "8"  # (6 - 2.5) / 0.41
    *_, training = parts(12, 10, tmp_path)
    assert training.arguments[1:4] == ("fused", "graphs", "plain")
    *_, training = parts(80, 10, tmp_path)
    assert "bf16-fused" in training.arguments


def test_the_shares_fill_the_time_and_every_script_is_there(tmp_path: Path) -> None:
    found = parts(80, 10, tmp_path, bnb=True)
    assert sum(part.share for part in found) == pytest.approx(1)
    for part in found:
        assert (own_card.HERE / part.script).is_file()
    assert "bnb" in found[1].arguments


def _part(place: Path, code: str) -> Part:
    (place / "part.py").write_text(code)
    return Part("of a test", str(place / "part.py"), 1, ())


def test_a_part_that_fails_keeps_its_rows_and_tells_its_error(tmp_path: Path) -> None:
    told = run(_part(tmp_path, "print('| a row |', flush=True)\nraise ValueError('the end')"), 60)
    assert told.startswith("| a row |\n")
    assert "failed with status 1" in told
    assert "ValueError: the end" in told


def test_a_part_that_a_signal_ends_says_so(tmp_path: Path) -> None:
    code = "import os, signal\nprint('| a row |', flush=True)\nos.kill(os.getpid(), signal.SIGKILL)"
    told = run(_part(tmp_path, code), 60)
    assert told.startswith("| a row |\n")
    assert "failed with status -9" in told


def test_a_part_out_of_its_time_keeps_its_rows(tmp_path: Path) -> None:
    code = "import time\nprint('| a row |', flush=True)\ntime.sleep(60)"
    told = run(_part(tmp_path, code), 2)
    assert told == "| a row |\n\nstopped after 2 s\n"
