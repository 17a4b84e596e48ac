"""`loftq inspect` shows what is there and fails on damage."""

from collections.abc import Callable
from pathlib import Path


def test_the_table_and_the_totals(loftq: Callable, out: Path) -> None:
    answer = loftq("inspect", out)
    assert answer.code == 0
    assert "model.layers.1.mlp.down_proj" in answer.out
    assert "nf2-g64-dq" in answer.out
    assert "from files" not in answer.out
    assert "result   in order" in answer.out


def test_check_and_source_show_the_deviation(loftq: Callable, out: Path, model: Path) -> None:
    answer = loftq("inspect", out, "--check", "--source", model)
    assert answer.code == 0
    assert "from files" in answer.out
    assert "largest relative deviation from the record" in answer.out


def test_json_is_one_object(loftq: Callable, out: Path, model: Path) -> None:
    report = loftq("inspect", out, "--check", "--source", model, "--json").json
    assert report["ok"]
    assert report["problems"] == []
    assert report["max_deviation"] <= 1e-6
    assert len(report["layers"]) == 14


def test_damage_exits_with_1_and_names_the_file(loftq: Callable, out: Path) -> None:
    shard = next(out.glob("loftq-*.safetensors"))
    raw = bytearray(shard.read_bytes())
    raw[-1] ^= 1
    shard.write_bytes(raw)
    answer = loftq("inspect", out, "--check")
    assert answer.code == 1
    assert f"problem: {shard}: " in answer.err
    assert "problems" in answer.out
    report = loftq("inspect", out, "--check", "--json")
    assert report.code == 1
    assert not report.json["ok"]


def test_long_lists_of_problems_are_cut_for_people(loftq: Callable, out: Path) -> None:
    (out / "config.json").write_text('{"quantization_config": {"quant_method": "loftq"}}')
    answer = loftq("inspect", out)
    assert answer.err.count("problem: ") <= 20


def test_another_folder_is_one_error(loftq: Callable, model: Path, tmp_path: Path) -> None:
    for folder in (model, tmp_path / "nowhere"):
        answer = loftq("inspect", folder)
        assert (answer.code, answer.out) == (1, "")
        assert answer.err.startswith(f"error: {folder}: no ")
