"""`loftq quantize`: what it says, what it writes, how it goes on, and what it refuses."""

import json
import os
import pty
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import loftq as library
from loftq.pipeline import stream as engine

WEIGHT = "model.layers.1.mlp.up_proj.weight"
NANS = torch.full((2,), torch.nan).numpy().tobytes()


def test_a_bare_command_says_each_default_with_its_reason(
    loftq: Callable, model: Path, tmp_path: Path
) -> None:
    answer = loftq("quantize", model, "-o", tmp_path / "new")
    assert answer.code == 0
    lines = answer.out.splitlines()
    assert lines[0] == f"quantize: {model} (LlamaForCausalLM) -> {tmp_path / 'new'}"
    first = {line.split()[0]: line for line in lines[1:12] if line[:1].strip()}
    assert "nf4-g64-dq" in first["format"]
    assert "4 bits: where QLoRA and LoftQ report" in first["format"]
    assert "loftq, T = 5" in first["method"]
    assert "needs no data" in first["method"]
    assert " 16 (" in first["rank"]
    assert "= rank" in first["alpha"]
    assert "14 linear layers in 2 blocks" in first["layers"]
    assert "all of them" in first["layers"]
    record = json.loads((tmp_path / "new/loftq.json").read_text())
    assert record["config"]["rank"] == 16
    assert {layer["format"] for layer in record["layers"]} == {"nf4-g64-dq"}
    assert {layer["scaling"] for layer in record["layers"]} == {1.0}


def test_away_from_a_terminal_only_start_and_end_are_printed(
    loftq: Callable, model: Path, tmp_path: Path
) -> None:
    answer = loftq("quantize", model, "-o", tmp_path / "new", "--rank", 4)
    assert answer.err == ""
    assert "\r" not in answer.out
    assert "\x1b" not in answer.out
    ends = [line.split()[0] for line in answer.out.splitlines()[-6:]]
    assert ends == ["done", "wrote", "report", "next", "loftq", "in"]
    assert "14 layers in" in answer.out
    assert len(answer.out.splitlines()) < 21


def test_on_a_terminal_progress_is_shown(model: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "loftq", "quantize", str(model), "-o", str(tmp_path / "new")]
    leader, follower = pty.openpty()
    environment = {**os.environ, "COLUMNS": "120", "TERM": "xterm"}
    done = subprocess.run(
        [*command, "--rank", "4"], stderr=follower, stdout=subprocess.PIPE, env=environment
    )
    os.close(follower)
    shown = os.read(leader, 1 << 20).decode()
    os.close(leader)
    assert done.returncode == 0
    assert "layers" in shown
    assert "left" in shown
    assert "14 layers in" in done.stdout.decode()


def test_json_is_one_object_and_nothing_else(loftq: Callable, model: Path, tmp_path: Path) -> None:
    answer = loftq("quantize", model, "-o", tmp_path / "new", "--rank", 4, "--json", "iters=1")
    result = answer.json
    assert result["config"]["iters"] == 1
    assert result["totals"]["mean_error"] < result["totals"]["mean_plain_error"]
    assert len(result["layers"]) == 14
    assert result["resumed_layers"] == 0
    assert {choice["name"] for choice in result["choices"]} >= {"format", "method", "rank"}


def test_flags_pairs_and_file_reach_the_record(
    loftq: Callable, model: Path, tmp_path: Path
) -> None:
    (tmp_path / "c.yaml").write_text("rank: 8\niters: 2\nseed: 5\n")
    answer = loftq(
        "quantize", model, "--config", tmp_path / "c.yaml", "-o", tmp_path / "new", "--rank", 3,
        "--alpha", 6, "--skip", "k_proj,v_proj", "--targets", "self_attn", "scale_fit=absmax",
        "formats=*.o_proj:sint8-g32-f16", "max_shard_bytes=20kB",
    )  # fmt: skip
    assert answer.code == 0
    record = json.loads((tmp_path / "new/loftq.json").read_text())
    config = record["config"]
    assert (config["rank"], config["alpha"], config["iters"], config["seed"]) == (3, 6.0, 2, 5)
    formats = {layer["name"].rsplit(".", 1)[1]: layer["format"] for layer in record["layers"]}
    assert formats == {"q_proj": "nf4-g64-dq", "o_proj": "sint8-g32-f16"}
    assert {layer["scale_fit"] for layer in record["layers"]} == {"absmax"}
    assert len(list((tmp_path / "new").glob("loftq-*.safetensors"))) > 1


def interrupt(monkeypatch: pytest.MonkeyPatch, *, after: int) -> None:
    """Press Ctrl-C when `after` batches are solved."""
    solved, real = [], engine.solve_batch

    def solve(*args: Any) -> Any:
        if len(solved) == after:
            raise KeyboardInterrupt
        solved.append(1)
        return real(*args)

    monkeypatch.setattr(engine, "solve_batch", solve)


def test_an_interrupted_run_says_so_and_the_same_command_resumes(
    loftq: Callable, model: Path, tmp_path: Path
) -> None:
    command = ("quantize", model, "-o", tmp_path / "new", "--rank", 4)
    with pytest.MonkeyPatch.context() as patch:
        interrupt(patch, after=3)
        stopped = loftq(*command)
    assert stopped.code == 130
    assert stopped.err == f"interrupted; the same command continues {tmp_path / 'new'}.\n"
    assert not (tmp_path / "new/config.json").exists()
    resumed = loftq(*command)
    assert resumed.code == 0
    assert "done by an earlier run" in resumed.out
    assert "of 14 done" in resumed.out
    assert loftq("inspect", tmp_path / "new", "--check", "--source", model).code == 0


def test_other_settings_do_not_resume(loftq: Callable, model: Path, tmp_path: Path) -> None:
    with pytest.MonkeyPatch.context() as patch:
        interrupt(patch, after=1)
        loftq("quantize", model, "-o", tmp_path / "new", "--rank", 4)
    answer = loftq("quantize", model, "-o", tmp_path / "new", "--rank", 5)
    assert answer.code == 1
    assert "config.rank: 4 then, 5 now" in answer.err


def test_a_finished_output_is_not_overwritten_unasked(
    loftq: Callable, model: Path, out: Path
) -> None:
    before = (out / "loftq.json").read_bytes()
    answer = loftq("quantize", model, "-o", out, "--rank", 4)
    assert answer.code == 1
    assert "holds a finished model" in answer.err
    assert "--overwrite" in answer.err
    assert (out / "loftq.json").read_bytes() == before
    assert loftq("quantize", model, "-o", out, "--rank", 4, "--overwrite").code == 0
    assert (out / "loftq.json").read_bytes() != before


def edit(path: Path, **values: Any) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


def put_nan(model: Path) -> None:
    weights = load_file(model / "model.safetensors")
    weights[WEIGHT][3, 4] = torch.nan
    save_file(weights, model / "model.safetensors", metadata={"format": "pt"})


def put_huge(model: Path) -> None:
    weights = load_file(model / "model.safetensors")
    weights[WEIGHT][3, 4] = 1e25
    save_file(weights, model / "model.safetensors", metadata={"format": "pt"})


def truncate(model: Path) -> None:
    path = model / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-50])


def index(model: Path, file: str) -> None:
    weights = load_file(model / "model.safetensors")
    (model / "model.safetensors").rename(model / "part.safetensors")
    names = dict.fromkeys(weights, "part.safetensors") | {WEIGHT: file}
    (model / "model.safetensors.index.json").write_text(json.dumps({"weight_map": names}))


def pickled(model: Path) -> None:
    (model / "model.safetensors").rename(model / "pytorch_model.bin")


def quantized(model: Path) -> None:
    edit(model / "config.json", quantization_config={"quant_method": "gptq", "bits": 4})


def gguf(model: Path) -> None:
    (model / "model.safetensors").unlink()
    (model / "config.json").unlink()
    (model / "model-q4.gguf").write_bytes(b"GGUF")


def alone(model: Path) -> None:
    """Leave the model as it is."""


@pytest.mark.parametrize(
    ("damage", "words", "messages"),
    [
        (put_nan, [], [WEIGHT, "1 of 3600 values are NaN or infinite", "skip="]),
        (put_huge, [], [WEIGHT, "1 of 3600 values are", "beyond 1e+15", "skip="]),
        (truncate, [], ["model.safetensors"]),
        (lambda m: index(m, "../part.safetensors"), [], ["../part.safetensors"]),
        (lambda m: index(m, "gone.safetensors"), [], ["gone.safetensors"]),
        (pickled, [], ["pytorch_model.bin", "safetensors"]),
        (quantized, [], ["GPTQ", "quantized"]),
        (gguf, [], ["gguf"]),
        (alone, ["--rank", 30], ["self_attn.k_proj: rank=30 exceeds", "= 24", "skip="]),
        (alone, ["--alpha", 0], ["alpha=0.0: must be positive"]),
        (alone, ["--format", "nff4"], ["unknown format 'nff4'", "Did you mean nf4?"]),
        (alone, ["--method", "lotfq"], ["unknown method 'lotfq'. Did you mean loftq?"]),
        (alone, ["--for", "vlm"], ["engine='vlm' does not exist", "vllm"]),
        (alone, ["--for", "vllm", "--bits", 3], ["engine=vllm: picks the format by itself"]),
        (alone, ["--skip", "model.layers"], ["nothing to quantize"]),
        (alone, ["--skip", "k_prj"], ["'k_prj' matches no module", "k_proj"]),
        (alone, ["--device", "cuda:99"], ["device='cuda:99'", "loftq doctor"]),
        (alone, ["--device", "gpu"], ["device='gpu'"]),
        (alone, ["iters=-1"], ["iters=-1"]),
        (alone, ["iters=x"], ["iters=x: expected a whole number"]),
        (alone, ["--config", "none.yaml"], ["none.yaml"]),
    ],
)
def test_bad_input_is_one_clear_error(
    loftq: Callable,
    model: Path,
    tmp_path: Path,
    damage: Callable[[Path], object],
    words: list[object],
    messages: list[str],
) -> None:
    damage(model)
    rank = [] if "--rank" in words else ["--rank", 4]
    answer = loftq("quantize", model, "-o", tmp_path / "new", *rank, *words, "--json")
    assert answer.code == 1
    assert answer.out == ""
    assert answer.err.startswith("error: ")
    assert all(message in answer.err for message in messages), answer.err
    assert not (tmp_path / "new/config.json").exists()


def test_a_bad_weight_costs_nothing_but_itself(
    loftq: Callable, model: Path, tmp_path: Path
) -> None:
    path = model / "model.safetensors"
    whole = path.read_bytes()
    path.write_bytes(whole.replace(load_file(path)[WEIGHT][3, 4:6].numpy().tobytes(), NANS))
    command = ("quantize", model, "-o", tmp_path / "new", "--rank", 4)
    refused = loftq(*command)
    assert f"{WEIGHT}: 2 of 3600 values are NaN or infinite" in refused.err
    path.write_bytes(whole)
    mended = loftq(*command)
    assert mended.code == 0
    assert "done by an earlier run" in mended.out


def test_output_and_input_are_not_the_same_folder(loftq: Callable, model: Path) -> None:
    answer = loftq("quantize", model, "-o", model / ".", "--overwrite", "--rank", 4)
    assert answer.code == 1
    assert "output and input are the same folder" in answer.err


def test_an_output_of_ours_is_no_input(loftq: Callable, out: Path, tmp_path: Path) -> None:
    answer = loftq("quantize", out, "-o", tmp_path / "new")
    assert answer.code == 1
    assert "quantized" in answer.err


def test_a_missing_repository_is_one_message(loftq: Callable, tmp_path: Path) -> None:
    answer = loftq("quantize", "no-one/no-such-model", "-o", tmp_path / "new")
    assert answer.code == 1
    assert answer.err.startswith("error: no-one/no-such-model: ")
    assert len(answer.err.splitlines()) == 1


def test_a_full_disk_is_found_before_any_work(
    loftq: Callable, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = type("Usage", (), {"free": 10})
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)
    answer = loftq("quantize", model, "-o", tmp_path / "new", "--rank", 4)
    assert answer.code == 1
    assert "no space left" in answer.err
    assert "10 bytes free" in answer.err


def test_what_the_command_made_loads(loftq: Callable, model: Path, tmp_path: Path) -> None:
    assert loftq("quantize", model, "-o", tmp_path / "new", "--rank", 4).code == 0
    loaded = library.load(tmp_path / "new")
    assert loaded(input_ids=torch.tensor([[5, 6, 7]])).logits.isfinite().all()


def test_text_that_is_too_short_is_said_before_and_after_and_refused_if_strict(
    loftq: Callable, model: Path, tmp_path: Path
) -> None:
    (tmp_path / "few.txt").write_text("one two three")
    words = ("--rank", 4, "--method", "cloq", "--data", tmp_path / "few.txt")
    assert "few: a Gram of" in loftq("plan", model, *words).out
    answer = loftq("quantize", model, "-o", tmp_path / "new", *words)
    assert answer.code == 0
    assert "noted" in answer.out
    assert "damping fills the rest; 13 more in the report" in answer.out
    refused = loftq("quantize", model, "-o", tmp_path / "other", *words, "strict=true")
    assert refused.code == 1
    assert "Calibrate on more, finite text, or set strict=false" in refused.err
    plain = loftq("quantize", model, "-o", tmp_path / "plain", "--rank", 4)
    assert "noted" not in plain.out


def test_layers_that_were_tried_rotated_are_counted_and_are_no_departure(
    loftq: Callable, model: Path, tmp_path: Path
) -> None:
    words = ("--rank", 4, "--bits", 2, "--rotation", "auto")
    answer = loftq("quantize", model, "-o", tmp_path / "new", *words)
    layers = json.loads((tmp_path / "new" / "loftq.json").read_text())["layers"]
    tried = [layer for layer in layers if layer["rival"]]
    turned = sum("-h" in layer["format"] for layer in tried)
    assert 0 < turned < len(tried)
    assert f"{turned} of {len(tried)} layers, whose error is smaller so" in answer.out
    assert "noted" not in answer.out


def test_a_refinement_is_said_before_and_after_and_in_a_plan(
    loftq: Callable, model: Path, tmp_path: Path
) -> None:
    (tmp_path / "some.txt").write_text(" ".join(["one two three four", "five six"] * 300))
    words = ["--method", "max", "--data", tmp_path / "some.txt", "--bits", "2", "--rank", "4"]
    words += ["calibration_windows=20", "calibration_context=32", "refine_epochs=2"]
    words += ["refine=block-distill"]
    planned = loftq("plan", model, *words)
    assert planned.code == 0
    assert "a rough estimate of the gradient steps" in planned.out
    answer = loftq("quantize", model, "-o", tmp_path / "new", *words)
    assert answer.code == 0
    assert "block-distill (block x 2, model x 2 passes)" in answer.out
    assert answer.out.count("held-out loss") == 2
    assert " to refine" in answer.out
    assert loftq("inspect", tmp_path / "new", "--check", "--source", model).code == 0
    refused = loftq("quantize", model, "-o", tmp_path / "other", "--method", "max")
    assert refused.code == 1
    assert "method=max: needs text to calibrate on" in refused.err
