"""The front door: bad input, resume, kill, overwrite, greedy refinement, accounting of bytes."""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import loftq
from zoo import build, save

OPTIONS = {"bits": 2, "rank": 4, "device": "cpu"}


@pytest.fixture
def source(tmp_path):
    return save(build("llama"), tmp_path / "source")


def files_of(folder):
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name != "timings.json"
    }


def edit(source, name, change):
    path = source / "model.safetensors"
    tensors = load_file(path)
    change(tensors[name])
    save_file(tensors, path, {"format": "pt"})


def test_two_runs_are_byte_identical(source, tmp_path):
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        shutil.rmtree(tmp_path / "out", ignore_errors=True)
        loftq.quantize(source, tmp_path / "out", **OPTIONS)
        shutil.copytree(tmp_path / "out", tmp_path / name, dirs_exist_ok=True)
    assert files_of(tmp_path / "a") == files_of(tmp_path / "b")


def test_packed_files_have_the_planned_size_to_the_byte(source, tmp_path):
    result = loftq.quantize(source, tmp_path / "out", **OPTIONS)
    on_disk = sum(p.stat().st_size for p in (tmp_path / "out").rglob("*.safetensors"))
    assert on_disk == result.plan.disk_bytes
    packed = sum(
        record["bits_per_weight"] * layer.weights / 8
        for record, layer in zip(result.records, result.plan.layers, strict=True)
    )
    assert packed == pytest.approx(result.plan.packed_bytes, abs=1e-6)


KILLED = """
import sys, loftq
loftq.quantize(sys.argv[1], sys.argv[2], bits=2, rank=4, device="cpu")
"""


@pytest.mark.slow
def test_twenty_kills_end_in_the_same_bytes(source, tmp_path):
    out = tmp_path / "out"
    loftq.quantize(source, out, **OPTIONS)
    expected = files_of(out)
    shutil.rmtree(out)
    command = [sys.executable, "-c", KILLED, str(source), str(out)]
    draw, kills = random.Random(0), 0
    while kills < 20:
        begun = time.perf_counter()
        process = subprocess.Popen(command, env=dict(os.environ), stderr=subprocess.DEVNULL)
        while not (out / ".loftq-journal.jsonl").exists() and process.poll() is None:
            time.sleep(0.002)
        time.sleep(draw.uniform(0, 0.25))
        if process.poll() is None:
            process.send_signal(signal.SIGKILL)
        process.wait()
        kills += 1
        assert time.perf_counter() - begun < 120
        if (out / "config.json").exists() and not (out / ".loftq-journal.jsonl").exists():
            assert files_of(out) == expected
            shutil.rmtree(out)
    if not (out / "config.json").exists():
        loftq.quantize(source, out, **OPTIONS)
    assert files_of(out) == expected


def test_an_interrupted_run_continues(source, tmp_path):
    whole = loftq.quantize(source, tmp_path / "whole", **OPTIONS)
    seen = []

    def stop(batch, records, resumed):
        seen.append((batch.name, resumed))
        if len(seen) == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        loftq.quantize(source, tmp_path / "out", on_batch=stop, **OPTIONS)
    assert not (tmp_path / "out" / "config.json").exists()
    seen.clear()
    again = loftq.quantize(
        source, tmp_path / "out", on_batch=lambda b, r, done: seen.append((b.name, done)), **OPTIONS
    )
    assert seen[0][1]
    assert again.hashes == whole.hashes
    with pytest.raises(ValueError, match="holds a finished model"):
        loftq.quantize(source, tmp_path / "out", **OPTIONS)


def test_other_settings_are_refused_on_resume(source, tmp_path):
    def stop(*_):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        loftq.quantize(source, tmp_path / "out", on_batch=stop, **OPTIONS)
    with pytest.raises(ValueError, match="seed"):
        loftq.quantize(source, tmp_path / "out", seed=1, **OPTIONS)


def test_another_torch_or_gpu_is_refused_on_resume(source, tmp_path, monkeypatch):
    def stop(*_):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        loftq.quantize(source, tmp_path / "out", on_batch=stop, **OPTIONS)
    monkeypatch.setattr("loftq.pipeline.plan._machine", lambda device: "torch 9.9, Other GPU")
    with pytest.raises(ValueError, match=r"machine.*torch 9\.9, Other GPU"):
        loftq.quantize(source, tmp_path / "out", **OPTIONS)


def test_overwrite_leaves_nothing_of_the_old_output(source, tmp_path):
    loftq.quantize(source, tmp_path / "out", max_shard_bytes=20_000, **OPTIONS)
    assert len(list((tmp_path / "out").glob("loftq-0*.safetensors"))) > 1
    loftq.quantize(source, tmp_path / "out", overwrite=True, **OPTIONS)
    names = [p.name for p in (tmp_path / "out").glob("loftq-0*.safetensors")]
    assert names == ["loftq-00001-of-00001.safetensors"]


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_a_weight_that_is_not_finite_is_named_and_repairable(source, tmp_path, bad):
    name = "model.layers.1.mlp.up_proj.weight"
    value = load_file(source / "model.safetensors")[name][3, 5].item()
    edit(source, name, lambda t: t[3, 5].fill_(bad))
    with pytest.raises(ValueError, match=rf"{name}: 1 of \d+ values are NaN or infinite"):
        loftq.quantize(source, tmp_path / "out", **OPTIONS)
    edit(source, name, lambda t: t[3, 5].fill_(value))
    loftq.quantize(source, tmp_path / "again", **OPTIONS)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rank": 500}, r"rank=500 exceeds min\(48, 48\) = 48"),
        ({"design_rank": 500}, r"design_rank=500 exceeds min\(48, 48\) = 48"),
        ({"design_rank": 0}, r"design_rank=0: must be at least 1"),
        ({"alpha": 0}, "alpha=0: must be positive"),
        ({"method": "loftqq"}, "Did you mean loftq"),
        ({"format": "nff4"}, "Did you mean nf4"),
        ({"bits": 5}, "choose 4, 3, 2 or a fraction"),
        ({"rnk": 4}, "Did you mean rank"),
        ({"skip": ["*.no_such"]}, "no_such"),
        ({"scale_fit": "max"}, "scale_fit='max' does not exist"),
    ],
)
def test_bad_options_say_what_to_do(source, tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        loftq.quantize(source, tmp_path / "out", **{"device": "cpu", **options})
    assert not (tmp_path / "out").exists()


def test_output_and_input_may_not_be_one_folder(source):
    before = files_of(source)
    with pytest.raises(ValueError, match="same folder"):
        loftq.quantize(source, source, **OPTIONS)
    assert files_of(source) == before


def test_a_fraction_of_bits_mixes_by_depth(source, tmp_path):
    result = loftq.quantize(source, tmp_path / "out", bits=3, rank=4, device="cpu")
    assert {r["format"] for r in result.records} == {"nf3-g64-dq"}
    mixed = loftq.quantize(source, tmp_path / "mixed", bits=2.99999, rank=4, device="cpu")
    assert {r["format"] for r in mixed.records} == {"nf2-g64-dq"}
    half = loftq.quantize(source, tmp_path / "half", bits=3.5, rank=4, device="cpu")
    first = {r["format"] for r in half.records if "layers.0." in r["name"]}
    assert first == {"nf4-g64-dq"}


@pytest.mark.parametrize(("alpha", "rslora"), [(1, False), (32, False), (4, True)])
def test_start_does_not_depend_on_alpha(source, tmp_path, alpha, rslora):
    plain = loftq.quantize(source, tmp_path / "plain", **OPTIONS)
    scaled = loftq.quantize(source, tmp_path / "out", alpha=alpha, rslora=rslora, **OPTIONS)
    for a, b in zip(plain.records, scaled.records, strict=True):
        assert b["error"] == pytest.approx(a["error"], rel=1e-5)


def test_greedy_keeps_what_the_metric_accepts(source, tmp_path):
    loftq.quantize(source, tmp_path / "out", method="qlora", **OPTIONS)
    model = loftq.load(tmp_path / "out", trainable=True)
    before = {k: v.clone() for k, v in model.state_dict().items() if "lora_" in k}
    kept = loftq.greedy_adapter(model, source, lambda _model, path: "q_proj" in path)
    assert {path for path, ok in kept.items() if ok} == {p for p in kept if "q_proj" in p}
    for key, old in before.items():
        now = model.state_dict()[key]
        assert torch.equal(now, old) != ("q_proj" in key), key


def test_adapter_of_another_backbone_is_refused(source, tmp_path):
    loftq.quantize(source, tmp_path / "a", **OPTIONS)
    loftq.quantize(source, tmp_path / "b", seed=3, format="nf2-g32", rank=4, device="cpu")
    with pytest.raises(ValueError, match="belongs to backbone"):
        loftq.load(tmp_path / "a", adapter=tmp_path / "b" / "init_adapter")


def test_plan_reads_headers_only(source):
    planned = loftq.plan(source, **OPTIONS)
    path = source / "model.safetensors"
    size = path.stat().st_size
    header = int.from_bytes(path.read_bytes()[:8], "little") + 8
    with Path(path).open("r+b") as file:
        file.seek(header)
        file.write(b"\xff" * (size - header))
    again = loftq.plan(source, **OPTIONS)
    assert again.packed_bytes == planned.packed_bytes
    assert json.dumps(planned.config.to_dict())
