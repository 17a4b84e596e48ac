"""The doctor finds what is missing and never breaks on it."""

import contextlib
import re
import sys
from importlib import metadata
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from loftq.report import Check, doctor

module: Any = sys.modules["loftq.report.doctor"]  # the package's name is the function
PROJECT = Path(__file__).parents[2] / "pyproject.toml"


def found(checks: list[Check]) -> dict[str, Check]:
    return {check.name: check for check in checks}


def requirements(text: str) -> dict[str, str]:
    """Name -> version range of every quoted requirement."""
    return dict(re.findall(r'"([\w-]+)((?:[<>=]=?[\d.]+,?)+)"', text))


def test_here_everything_that_is_needed_is_found() -> None:
    checks = doctor()
    assert [check for check in checks if check.status == "fail"] == []
    names = found(checks)
    assert {"python", "torch", "transformers", "peft", "torch build", "disk"} <= names.keys()
    assert names["torch"].found == metadata.version("torch")
    assert all(check.advice for check in checks if check.status in ("warn", "fail"))


def test_the_ranges_are_those_of_the_package() -> None:
    text = PROJECT.read_text()
    needed = requirements(text[text.index("\ndependencies") : text.index("[project.optional")])
    ours = {
        name: f">={oldest}" + (f",<{too_new}" if too_new else "")
        for name, (oldest, too_new) in module.REQUIRED.items()
    }
    assert ours == needed


def test_the_extras_are_those_of_the_package() -> None:
    text = PROJECT.read_text()
    for extra, packages in module.EXTRAS.items():
        line = re.search(rf"^{extra} = (\[.*?\])", text, re.MULTILINE | re.DOTALL)
        assert line is not None
        assert tuple(requirements(line[1])) == packages


def test_what_a_verb_takes_is_what_its_extra_brings() -> None:
    text = PROJECT.read_text()
    for verb, packages in module.VERBS.items():
        line = re.search(rf"^{verb} = (\[.*?\])", text, re.MULTILINE)
        wanted = requirements(line[1]) if line else {}
        assert {name: f">={oldest}" for name, (oldest, _) in packages.items()} == wanted


def test_a_verb_works_or_says_what_it_needs(monkeypatch: pytest.MonkeyPatch) -> None:
    versions = {"trl": "1.15.2", "jinja2": "3.1.6"}
    monkeypatch.setattr(module, "version", versions.get)
    names = found(list(module._verbs()))
    assert names["loftq chat"].status == "ok"
    assert re.fullmatch("works here, on the (CPU|GPU)", names["loftq chat"].found)
    assert names["loftq train"].status == "info"
    assert names["loftq train"].found == "needs trl>=1.16 (found 1.15.2), datasets>=4"
    assert names["loftq train"].advice == "pip install 'loftq[train]'"
    assert names["report pages"].found == "needs matplotlib>=3.9"


@pytest.mark.parametrize(
    ("version", "inside"),
    [
        ("5.17.0", True),
        ("5.17", True),
        ("5.99.1.dev0", True),
        ("5.16.9", False),
        ("6.0.0", False),
        ("unknown", False),
    ],
)
def test_ranges_compare_release_numbers(version: str, inside: bool) -> None:
    assert module.in_range(version, "5.17", "6") is inside


def test_a_local_build_counts_as_its_release() -> None:
    assert module.in_range("2.11.0+cpu", "2.11", None)


def test_missing_and_old_packages_fail_with_the_command(monkeypatch: pytest.MonkeyPatch) -> None:
    def version(name: str) -> str:
        if name == "peft":
            raise metadata.PackageNotFoundError(name)
        return "4.57.1" if name == "transformers" else real(name)

    real = metadata.version
    monkeypatch.setattr(metadata, "version", version)
    names = found(doctor())
    assert names["peft"].status == "fail"
    assert names["peft"].advice == "pip install 'peft>=0.21'"
    assert names["transformers"].found == "4.57.1"
    assert names["transformers"].advice == "pip install 'transformers>=5.17,<6'"


def test_packages_that_read_exports_are_told_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    def version(name: str) -> str:
        if name == "vllm":
            raise metadata.PackageNotFoundError(name)
        return {"bitsandbytes": "0.43.1", "optimum": "2.1.0"}.get(name) or real(name)

    real = metadata.version
    monkeypatch.setattr(metadata, "version", version)
    names = found(doctor())
    old = names["reads exports: bitsandbytes"]
    assert (old.status, old.found) == ("warn", "0.43.1")
    assert old.advice == (
        "pip install 'bitsandbytes>=0.46.1' to read bnb exports in transformers here"
    )
    assert names["reads exports: optimum"].status == "ok"
    absent = names["reads exports: vllm"]
    assert (absent.status, absent.found) == ("info", "not installed")
    assert "compressed-tensors, gptq, bnb exports in vllm" in absent.advice


def test_a_torch_that_does_not_import_is_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch", None)
    assert found(doctor())["torch build"].status == "fail"


def test_a_check_that_breaks_is_a_line_of_the_report(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(_: object) -> None:
        raise PermissionError("no entry")

    monkeypatch.setattr(module.shutil, "disk_usage", broken)
    warned = [check for check in doctor() if "PermissionError: no entry" in check.found]
    assert [check.status for check in warned] == ["warn"]


class FakeTorch(SimpleNamespace):
    """A torch with one GPU that was never in this machine."""

    def __init__(self, *, native: bool, available: bool = True, cuda: str | None = "13.0") -> None:
        super().__init__(
            version=SimpleNamespace(cuda=cuda, hip=None),
            device=lambda kind, index: f"{kind}:{index}",
            backends=SimpleNamespace(mps=SimpleNamespace(is_available=lambda: False)),
            cuda=SimpleNamespace(
                is_available=lambda: available,
                device_count=lambda: 1,
                mem_get_info=lambda index: (10 * 2**30, 16 * 2**30),
                get_device_name=lambda index: "Tesla T4",
                device=lambda index: contextlib.nullcontext(),
                is_bf16_supported=lambda including_emulation: native or including_emulation,
            ),
        )


@pytest.mark.parametrize("native", [True, False])
def test_a_gpu_is_named_with_its_memory_and_bfloat16(
    monkeypatch: pytest.MonkeyPatch, native: bool
) -> None:
    monkeypatch.setitem(sys.modules, "torch", FakeTorch(native=native))
    names = found(doctor())
    assert names["gpu 0"].found == "Tesla T4, 10.0 GiB of 16.0 GiB free"
    bfloat16 = names["gpu 0 bfloat16"]
    assert bfloat16.status == ("ok" if native else "warn")
    assert ("dtype=torch.float16" in bfloat16.advice) is not native


@pytest.mark.parametrize("kind", ["kernels", "CUDA C++", "decoding", "training"])
@pytest.mark.parametrize("why", ["", "triton is not installed"])
def test_a_gpu_without_kernels_is_a_warning_with_the_reason(
    monkeypatch: pytest.MonkeyPatch, why: str, kind: str
) -> None:
    monkeypatch.setattr("loftq.ops.dispatch.why_no_kernels", lambda device: why)
    monkeypatch.setattr("loftq.ops.dispatch.why_no_decoding", lambda device: why)
    monkeypatch.setattr("loftq.ops.dispatch.why_no_cuda", lambda device: why)
    monkeypatch.setattr("loftq.ops.dispatch.why_no_pointwise", lambda device: why)
    monkeypatch.setitem(sys.modules, "torch", FakeTorch(native=True))
    kernels = found(doctor())[f"gpu 0 {kind}"]
    assert kernels.status == ("warn" if why else "ok")
    assert why in kernels.found
    assert bool(kernels.advice) is bool(why)


def test_a_cpu_build_beside_a_driver_is_a_warning(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch", FakeTorch(native=False, available=False, cuda=None))
    monkeypatch.setattr(module, "_nvidia_driver", lambda: True)
    build = found(doctor())["torch build"]
    assert build.status == "warn"
    assert "CUDA build" in build.advice


def test_a_cuda_build_without_a_gpu_is_a_warning(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch", FakeTorch(native=False, available=False))
    assert "no GPU answers" in found(doctor())["torch build"].found


def test_memory_is_what_the_container_leaves(tmp_path: Path) -> None:
    (tmp_path / "memory.max").write_text("8000\n")
    (tmp_path / "memory.current").write_text("6000\n")
    (tmp_path / "memory.stat").write_text("anon 1000\ninactive_file 1500\n")
    assert module._container_memory(tmp_path) == 3500
    (tmp_path / "memory.max").write_text("max\n")
    assert module._container_memory(tmp_path) is None
    assert module._container_memory(tmp_path / "none") is None


def test_the_cpu_library_is_a_line_with_its_instructions_or_the_reason(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from loftq.ops.cpu import library

    (without,) = module._cpu_library()
    assert without.status == "info"
    assert without.found == "LOFTQ_CPU_ISA=none asks for plain PyTorch"
    assert "unpacked before each product" in without.advice
    monkeypatch.setenv("LOFTQ_CPU_ISA", "scalar")
    held = SimpleNamespace(isas=("scalar", "neon"))
    monkeypatch.setattr(library, "find_library", lambda: held)
    monkeypatch.setattr(library, "openmp_fork", lambda: None)
    (check,) = module._cpu_library()
    assert check.status == "ok"
    assert check.found == (
        "products use scalar on one thread: torch has no OpenMP here; this CPU has scalar, neon"
    )
