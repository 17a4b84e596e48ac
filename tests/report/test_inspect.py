"""An output in order is said to be; every kind of damage is found and named."""

import json
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import loftq
import zoo
from loftq.report import inspect_output
from loftq.report.inspect import InspectError
from loftq.report.output import OutputFiles
from tolerances import RECORD_ERROR

RANK = 4
SHARD = "loftq-00001-of-00001.safetensors"
PACKED = "model.layers.0.mlp.up_proj.weight_packed"
NESTED = "model.layers.0.mlp.up_proj.weight_nested"


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A source and its output."""
    folder = tmp_path_factory.mktemp("inspect")
    source = zoo.save(zoo.build("llama"), folder / "source")
    loftq.quantize(source, folder / "out", rank=RANK, alpha=2 * RANK)
    return source, folder / "out"


@pytest.fixture
def source(made: tuple[Path, Path]) -> Path:
    return made[0]


@pytest.fixture
def out(made: tuple[Path, Path], tmp_path: Path) -> Path:
    """A copy of the output to be damaged."""
    return Path(shutil.copytree(made[1], tmp_path / "out"))


def edit(path: Path, change: Callable[[Any], object]) -> None:
    """Change a JSON file in place."""
    value = json.loads(path.read_text())
    change(value)
    path.write_text(json.dumps(value))


def overwrite(path: Path, tensor: str, data: bytes, at: int = 0) -> None:
    """Overwrite bytes of a tensor in a safetensors file."""
    raw = bytearray(path.read_bytes())
    (length,) = struct.unpack("<Q", raw[:8])
    begin = 8 + length + json.loads(raw[8 : 8 + length])[tensor]["data_offsets"][0] + at
    raw[begin : begin + len(data)] = data
    path.write_bytes(raw)


def problems(folder: Path, *, check: bool = True, source: Path | None = None) -> str:
    report = inspect_output(folder, check, source)
    assert not report.ok
    return "\n".join(report.problems)


def test_headers_alone_give_totals_and_a_row_per_layer(out: Path) -> None:
    report = inspect_output(out)
    assert report.ok
    assert len(report.layers) == 14
    row = report.layers[0]
    assert (row.module, row.format) == ("model.layers.0.self_attn.q_proj", "nf4-g64-dq")
    assert 0 < row.error < row.plain_error < 0.2
    assert row.recomputed is None
    assert report.max_deviation is None
    assert report.model["rank"] == RANK
    assert report.model["scaling"] == 2
    stored = sum(t.numel() * t.element_size() for t in load_file(out / SHARD).values())
    assert report.bytes["packed"] + report.bytes["unquantized"] == stored
    assert report.bytes["model"] == stored + report.bytes["adapter"]


def test_an_output_in_order_passes_all_checks(out: Path, source: Path) -> None:
    steps: list[tuple[int, int]] = []
    report = inspect_output(out, True, source, on_step=lambda *step: steps.append(step))
    assert report.problems == []
    assert report.max_deviation is not None
    assert report.max_deviation <= RECORD_ERROR
    assert all(row.recomputed == pytest.approx(row.error) for row in report.layers)
    assert len(report.checks) == 6
    assert steps[-1][0] == steps[-1][1] == len(steps)
    json.dumps(report.to_dict(), allow_nan=False)


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("gpt2", {}),
        ("bert", {"embeddings": True, "format": "int3-g32-f16"}),
        ("llama-tied", {"method": "loftq-paper", "bits": 2}),
        ("llama", {"method": "qlora", "format": "uniform4"}),
        ("llama", {"rslora": True, "format": "sint8-channel-bf16", "max_shard_bytes": 20_000}),
    ],
)
def test_every_kind_of_layer_and_format_is_recomputed(
    tmp_path: Path, name: str, options: dict[str, Any]
) -> None:
    source = zoo.save(zoo.build(name), tmp_path / "source")
    loftq.quantize(source, tmp_path / "out", rank=RANK, **options)
    report = inspect_output(tmp_path / "out", True, source)
    assert report.problems == []
    assert report.max_deviation is not None
    assert report.max_deviation <= RECORD_ERROR


def test_a_flipped_byte_names_the_tensor_and_the_file(out: Path) -> None:
    byte = load_file(out / SHARD)[PACKED].flatten()[5].item()
    overwrite(out / SHARD, PACKED, bytes([byte ^ 1]), at=5)
    found = problems(out)
    assert f"{out / SHARD}: {PACKED}: sha256" in found
    assert "the backbone hash is" in found
    assert inspect_output(out).ok, "headers alone cannot know"


def test_scales_that_are_not_finite_are_found(out: Path) -> None:
    overwrite(out / SHARD, NESTED, struct.pack("<f", float("nan")))
    found = problems(out)
    assert f"{NESTED}: 1 numbers are not finite" in found
    assert "up_proj.weight_scale" in found  # every scale is decoded with it


def test_factors_that_are_not_finite_are_found(out: Path) -> None:
    name = "base_model.model.model.layers.0.mlp.up_proj.lora_B.weight"
    path = out / "init_adapter/adapter_model.safetensors"
    overwrite(path, name, struct.pack("<f", float("inf")))
    assert f"{path}: {name}: 1 numbers are not finite" in problems(out)


def test_a_truncated_shard_names_the_file(out: Path) -> None:
    raw = (out / SHARD).read_bytes()
    (out / SHARD).write_bytes(raw[:-100])
    assert SHARD in problems(out, check=False)


def test_a_missing_shard_names_the_file(out: Path) -> None:
    (out / SHARD).unlink()
    assert SHARD in problems(out, check=False)


def test_a_missing_adapter_is_found(out: Path) -> None:
    (out / "init_adapter/adapter_model.safetensors").unlink()
    assert "adapter_model.safetensors" in problems(out, check=False)


def test_a_tensor_of_another_dtype_is_found(out: Path) -> None:
    path = out / "init_adapter/adapter_model.safetensors"
    save_file({k: v.half() for k, v in load_file(path).items()}, path)
    assert "lora_A.weight: F16 (4, 48), expected F32 (4, 48)" in problems(out, check=False)


def test_a_tensor_that_nobody_recorded_is_found(out: Path) -> None:
    path = out / "init_adapter/adapter_model.safetensors"
    save_file({**load_file(path), "extra": torch.zeros(2)}, path)
    assert f"{path}: extra: its hash is not in loftq.json" in problems(out, check=False)


def test_an_error_that_the_files_do_not_have_is_found(out: Path, source: Path) -> None:
    def flatter(record: Any) -> None:
        record["layers"][3]["error"] *= 1 + 2e-6

    edit(out / "loftq.json", flatter)
    found = problems(out, check=False, source=source)
    assert "model.layers.0.self_attn.o_proj: error 0." in found
    assert "(relative difference 2.0e-06, allowed 1e-06)" in found


def test_another_source_is_refused_by_its_fingerprint(out: Path, tmp_path: Path) -> None:
    other = zoo.save(zoo.build("llama", seed=1), tmp_path / "other")
    assert f"{other}: not the model that" in problems(out, check=False, source=other)


@pytest.mark.parametrize(
    ("file", "change", "message"),
    [
        (
            "init_adapter/loftq_lineage.json",
            lambda v: v.update(backbone="0" * 64),
            "the adapter belongs to backbone 000000000000",
        ),
        (
            "init_adapter/adapter_config.json",
            lambda v: v.update(lora_alpha=16),
            "lora_alpha=16, quantized with 8",
        ),
        (
            "init_adapter/adapter_config.json",
            lambda v: v.update(rank_pattern={"model.layers.0.mlp.up_proj": 2}),
            "rank_pattern={'model.layers.0.mlp.up_proj': 2}, quantized with {}",
        ),
        (
            "init_adapter/adapter_config.json",
            lambda v: v.update(alpha_pattern={"up_proj": 2}),
            "alpha_pattern={'up_proj': 2}, quantized with {}",
        ),
        (
            "config.json",
            lambda v: v["quantization_config"].update(backbone="1" * 64),
            "111111111111 in config.json",
        ),
        (
            "config.json",
            lambda v: v["quantization_config"]["layers"].pop("model.layers.1.mlp.up_proj"),
            "model.layers.1.mlp.up_proj is None",
        ),
        (
            "loftq.json",
            lambda v: v["layers"][0].update(bits_per_weight=4.0),
            "model.layers.0.self_attn.q_proj: 1208 bytes packed; nf4-g64-dq takes 1208, the "
            "record says 1152",
        ),
        (
            "loftq.json",
            lambda v: v["totals"].update(packed_bytes=1),
            "packed_bytes is 1, the files hold",
        ),
        (
            "loftq.json",
            lambda v: v["tensors"].update(ghost="0" * 64),
            "tensor ghost is in no file",
        ),
    ],
)
def test_records_that_disagree_are_found(
    out: Path, file: str, change: Callable[[Any], object], message: str
) -> None:
    edit(out / file, change)
    assert message in problems(out)


def test_every_problem_says_what_to_do(out: Path) -> None:
    edit(out / "loftq.json", lambda v: v["totals"].update(packed_bytes=1))
    edit(out / "init_adapter/adapter_config.json", lambda v: v.update(r=5))
    overwrite(out / SHARD, NESTED, struct.pack("<f", float("nan")))
    report = inspect_output(out, check=True)
    assert len(report.problems) > 4
    assert all("quantize again" in problem for problem in report.problems)


def test_what_is_no_output_is_refused(tmp_path: Path, source: Path) -> None:
    with pytest.raises(InspectError, match="no such folder"):
        inspect_output(tmp_path / "nowhere")
    with pytest.raises(InspectError, match=r"no loftq\.json, so not an output"):
        inspect_output(source)


def test_an_unfinished_output_is_refused(out: Path) -> None:
    (out / ".loftq-journal.jsonl").write_text("{}\n")
    with pytest.raises(InspectError, match="an unfinished run"):
        inspect_output(out)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", r"loftq\.json: cannot be read"),
        ("[]", r"loftq\.json: not a JSON object"),
        ('{"version": 2}', r"loftq\.json: version 2, this loftq reads 1"),
        ('{"version": 1}', r"loftq\.json: without backbone, config, layers"),
    ],
)
def test_a_damaged_record_is_refused(out: Path, text: str, message: str) -> None:
    (out / "loftq.json").write_text(text)
    with pytest.raises(InspectError, match=message):
        inspect_output(out)


def test_a_damaged_layer_record_is_refused(out: Path) -> None:
    edit(out / "loftq.json", lambda v: v["layers"][2].pop("scaling"))
    with pytest.raises(InspectError, match="a layer's record is damaged"):
        inspect_output(out)


def test_opening_reads_no_weights(out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from loftq.checkpoint import Checkpoint

    def forbidden(*_: object) -> None:
        raise AssertionError("read a tensor")

    monkeypatch.setattr(Checkpoint, "read", forbidden)
    monkeypatch.setattr(Checkpoint, "read_bytes", forbidden)
    assert inspect_output(out).ok
    assert OutputFiles.open(out).where("nothing") == "nothing"
