"""`loftq export` and `loftq eval gap`: what they print, and what they refuse."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

import exported


@pytest.fixture(scope="module")
def _nf4(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("export")
    exported.write_model(folder / "model")
    exported.pack(folder / "model", folder / "out", format="nf4-g64-dq")
    exported.train(folder / "out", folder / "trained")
    (folder / "text.txt").write_text("".join(f"{text}\n" for text in exported.TEXT * 20))
    return folder


@pytest.fixture
def nf4(_nf4: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current folder: model, its NF4 output `out`, `trained`, `text.txt`."""
    folder = Path(shutil.copytree(_nf4, tmp_path / "here"))
    monkeypatch.chdir(folder)
    return folder


def test_it_says_what_was_written_and_how_to_serve_it(loftq: Callable, nf4: Path) -> None:
    answer = loftq("export", "out", "-o", "served", "--for", "transformers", "adapter=trained")
    assert answer.code == 0, answer.err
    assert answer.out.startswith("wrote    served: ")
    assert "checked  49 tensors equal to the source" in answer.out
    assert "\nlimit    the adapter (rank 4) belongs to this base alone" in answer.out
    first, second = answer.out.split("serve with ")[1:]
    assert first.splitlines() == [
        "transformers:",
        "  from transformers import AutoModelForCausalLM",
        "  from peft import PeftModel",
        "  model = AutoModelForCausalLM.from_pretrained('served')",
        "  model = PeftModel.from_pretrained(model, 'served/adapter')",
        "",
    ]
    assert second.strip().endswith(
        "vllm serve served --enable-lora --lora-modules out=served/adapter --max-lora-rank 8"
    )


def test_json_is_one_object(loftq: Callable, nf4: Path) -> None:
    result = loftq(
        "export", "out", "-o", "merged", "--to", "dense", "dtype=bfloat16", "--json"
    ).json
    assert result["target"] == "dense"
    assert result["folder"] == "merged"
    assert set(result["files"]) >= {"config.json", "model.safetensors.index.json", "README.md"}
    assert [place["engine"] for place in result["serve"]] == ["vllm", "transformers"]
    assert result["gap"] is None


def test_a_refusal_is_one_error(loftq: Callable, nf4: Path) -> None:
    answer = loftq("export", "out", "-o", "served", "--for", "llama.cpp")
    assert answer.code == 1
    assert answer.err.startswith("error: out: rounding it again for an export would make its")
    assert "gguf cannot hold it: model.layers.0.self_attn.q_proj (nf4-g64-dq): needs" in answer.err
    assert "again with --for llama.cpp, or serve what any format allows: --to lora" in answer.err
    assert not (nf4 / "served").exists()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "give either --to (bnb, gptq, compressed-tensors, gguf, lora, dense) or --for"),
        (["--for", "ollama"], "engine='ollama' does not exist"),
        (["--to", "dense", "max_shard_bytes=big"], "expected bytes, such as 5GB or 500MB"),
        (["--to", "dense", "colour=red"], "colour"),
        (["--to", "bnb", "--data", "text.txt"], "--data measures what --to lora costs"),
        (["--to", "lora", "--data", "none.txt"], "none.txt: no such file"),
        (["--to", "bnb", "adapter=none"], "none"),
    ],
)
def test_mistakes(words: list[str], message: str, loftq: Callable, nf4: Path) -> None:
    answer = loftq("export", "out", "-o", "served", *words)
    assert answer.code in (1, 2)
    assert message in answer.err
    assert not (nf4 / "served").exists()


def test_moving_to_the_original_model_is_measured(loftq: Callable, nf4: Path) -> None:
    words = ("--to", "lora", "adapter=trained", "--data", "text.txt")
    answer = loftq("export", "out", "-o", "lora", *words)
    assert answer.code == 0, answer.err
    assert "limit    for " in answer.out
    assert "loftq eval gap out lora --data FILE" in answer.out
    assert "loss of the packed model" in answer.out
    told = answer.out.split("loss on the original model")[1].split()[0]
    result = loftq(
        "eval", "gap", "out", "lora", "--adapter", "trained", "--data", "text.txt", "--json"
    ).json
    assert f"{result['original']:.4f}" == told
    assert result["gap"] == result["original"] - result["packed"]
    assert (result["context"], result["data"]) == (128, "text.txt")


def test_a_large_gap_is_a_warning(
    loftq: Callable, nf4: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert loftq("export", "out", "-o", "lora", "--to", "lora", "adapter=trained").code == 0
    words = ("eval", "gap", "out", "lora", "--adapter", "trained", "--data", "text.txt")
    words += ("--windows", "2", "--context", "64")
    small = loftq(*words)
    assert small.code == 0, small.err
    assert "over 126 predicted tokens of text.txt, context 64" in small.out
    assert "warning" not in small.out
    monkeypatch.setattr("loftq.eval.gap.LARGE_GAP", -10.0)
    assert "warning: on the original model the loss is" in loftq(*words).out


def test_only_an_adapter_for_the_original_has_a_gap(loftq: Callable, nf4: Path) -> None:
    assert loftq("export", "out", "-o", "served", "--to", "bnb").code == 0
    answer = loftq("eval", "gap", "out", "served", "--data", "text.txt")
    assert answer.code == 1
    assert "served: not made by `loftq export --to lora`" in answer.err


def test_an_earlier_export_is_kept_without_overwrite(loftq: Callable, nf4: Path) -> None:
    assert loftq("export", "out", "-o", "served", "--to", "bnb").code == 0
    again = loftq("export", "out", "-o", "served", "--to", "dense")
    assert again.code == 1
    assert "holds an earlier export" in again.err
    assert loftq("export", "out", "-o", "served", "--to", "dense", "--overwrite").code == 0
    assert json.loads((nf4 / "served" / "loftq_export.json").read_text())["to"] == "dense"
