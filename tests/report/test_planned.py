"""What `plan` says equals what `quantize` then writes."""

from pathlib import Path

import loftq
import zoo
from loftq.report import describe_plan, inspect_output


def test_the_bytes_of_the_plan_are_those_on_disk(tmp_path: Path) -> None:
    source = zoo.save(zoo.build("llama"), tmp_path / "source")
    options = {"rank": 4, "bits": 3, "device": "cpu"}
    report = describe_plan(loftq.plan(source, **options))
    loftq.quantize(source, tmp_path / "out", **options)
    found = inspect_output(tmp_path / "out")
    assert report.packed_bytes == found.bytes["packed"]
    assert report.unquantized_bytes == found.bytes["unquantized"]
    assert report.adapter_bytes == found.bytes["adapter"]
    assert report.bits_per_weight == found.bits_per_weight
    files = (tmp_path / "out").rglob("*.safetensors")
    assert report.disk_bytes == sum(path.stat().st_size for path in files)
    assert [entry["module"] for entry in report.layers] == [row.module for row in found.layers]
    assert report.loaded_bytes == found.bytes["model"]
    assert report.source_at_16_bits == found.bytes["source_at_16_bits"]
    assert 2 * report.source_at_16_bits == report.source_bytes  # a float32 model


def test_layers_are_grouped_by_name_shape_and_format(tmp_path: Path) -> None:
    source = zoo.save(zoo.build("llama"), tmp_path / "source")
    formats = {"layers.0.mlp.up_proj": "nf2-g32-f16"}
    report = describe_plan(loftq.plan(source, rank=4, formats=formats))
    ups = [group for group in report.groups if group.name == "up_proj"]
    assert [(group.format, group.layers) for group in ups] == [
        ("nf2-g32-f16", 1),
        ("nf4-g64-dq", 1),
    ]
    assert sum(group.packed_bytes for group in report.groups) == report.packed_bytes
    assert sum(group.layers for group in report.groups) == len(report.layers) == 14


def test_what_is_kept_is_said_with_its_reason(tmp_path: Path) -> None:
    source = zoo.save(zoo.build("llama"), tmp_path / "source")
    report = describe_plan(loftq.plan(source, rank=4, skip=["k_proj"]))
    kept = {group.reason: group for group in report.kept}
    assert kept["embedding"].example == "model.embed_tokens"
    assert kept["skipped"].modules == 2
    assert kept["skipped"].by_choice
    assert report.coverage == 1.0


def test_what_cannot_be_packed_is_no_choice(tmp_path: Path) -> None:
    source = zoo.save(zoo.build("mixtral"), tmp_path / "source")
    report = describe_plan(loftq.plan(source, rank=2, allow_uncovered=True))
    assert not next(group for group in report.kept if group.reason == "expert tensors").by_choice
    assert report.coverage < 0.8


def test_on_a_gpu_only_packed_results_pass_through_the_host(tmp_path: Path) -> None:
    source = zoo.save(zoo.build("llama"), tmp_path / "source")
    on_cpu = describe_plan(loftq.plan(source, rank=4, device="cpu"))
    on_gpu = describe_plan(loftq.plan(source, rank=4, device="cuda"))
    assert on_cpu.host_bytes == on_cpu.solve_bytes
    assert 0 < on_gpu.host_bytes < on_gpu.solve_bytes
