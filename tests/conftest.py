"""What all tests share: one thread, no CPU library, no model hub, a device, real models."""

import os
import platform
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path

import pytest
import torch

from loftq.ops.cpu.build import ANY, UNITS, BuildError, build_library, machine
from loftq.ops.cpu.library import ISA, ISAS, Library, find_library, forget_library, why_no_library

COMPAT_FOLDERS = ("chat", "integrations", "nn")
"""Rooms that meet transformers: their tests run again with the oldest supported version."""


def pytest_configure(config: pytest.Config) -> None:
    """One thread, and no hub unless `network` tests were asked for; inherited by subprocesses."""
    torch.set_num_threads(1)  # the workers of pytest-xdist are the parallelism
    os.environ.update(OMP_NUM_THREADS="1", MKL_NUM_THREADS="1", TOKENIZERS_PARALLELISM="false")
    # Whether a user has built the CPU library changes last bits; its tests build their own.
    os.environ.setdefault("LOFTQ_CPU_ISA", "none")
    if "network" not in config.option.markexpr.replace("not network", ""):
        os.environ.update(HF_HUB_OFFLINE="1", HF_DATASETS_OFFLINE="1")


def pytest_report_header() -> list[str]:
    """Name what decides the results, and what is missing for the tests on real models."""
    packages = ("torch", "transformers", "peft", "accelerate", "huggingface_hub")
    versions = ", ".join(f"{name} {_version(name)}" for name in packages)
    variables = ("LOFTQ_MODELS", "LOFTQ_DATA")
    folders = ", ".join(f"{name}={os.environ.get(name, 'not set')}" for name in variables)
    return [f"{versions}, {platform.machine()}", folders]


@pytest.hookimpl(tryfirst=True)  # before pytest looks at the marks
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark the tests of the rooms that meet transformers."""
    here = Path(__file__).parent
    for item in items:
        if item.path.relative_to(here).parts[0] in COMPAT_FOLDERS:
            item.add_marker(pytest.mark.compat)


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Run a test that takes `device` on the CPU and, marked gpu, on CUDA; gpu tests only there."""
    if "device" in metafunc.fixturenames:
        marked = map(metafunc.definition.get_closest_marker, ("gpu", "multi_gpu"))
        cuda = pytest.param("cuda", marks=pytest.mark.gpu)
        metafunc.parametrize("device", [cuda] if any(marked) else ["cpu", cuda], indirect=True)


@pytest.fixture
def device(request: pytest.FixtureRequest) -> torch.device:
    """Where a test runs: the CPU, or the first CUDA device in its `gpu` variant."""
    if request.param == "cuda" and not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    return torch.device(request.param)


@pytest.fixture
def generator() -> torch.Generator:
    """A fresh CPU generator with a fixed seed: each test draws the same numbers in any order."""
    return torch.Generator().manual_seed(0)


@pytest.fixture
def poisoned() -> Iterator[None]:
    """Every uninitialised tensor is full of NaN."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    assert torch.utils.deterministic.fill_uninitialized_memory
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(scope="session")
def models_dir() -> Path:
    """The folder of real pretrained models, one sub-folder each (LOFTQ_MODELS)."""
    return _folder("LOFTQ_MODELS", "a folder of pretrained models, such as smollm2-135m")


@pytest.fixture(scope="session")
def data_dir() -> Path:
    """The folder of real evaluation data (LOFTQ_DATA)."""
    return _folder("LOFTQ_DATA", "a folder of evaluation data, such as wikitext2/wiki.test.raw.gz")


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "missing"


def _folder(variable: str, what: str) -> Path:
    path = os.environ.get(variable)
    if not path:
        pytest.skip(f"{variable} is not set: {what}")
    folder = Path(path)
    if not folder.is_dir():  # set but wrong: a mistake, which a skip would hide
        pytest.fail(f"{variable}={path} is not a folder; expected {what}")
    return folder


@pytest.fixture(scope="session")
def built_cache(pytestconfig: pytest.Config) -> str:
    """LOFTQ_CACHE of a folder that holds the library, and none of older sources."""
    folder = str(pytestconfig.cache.mkdir("loftq-cpu"))  # type: ignore[union-attr]
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LOFTQ_CACHE", folder)
        try:
            path = build_library()
        except BuildError as error:
            pytest.skip(str(error))
    for old in set(path.parent.glob("*.so")) - {path}:
        old.unlink(missing_ok=True)  # another worker may have been faster
    return folder


@pytest.fixture
def library(built_cache: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[Library]:
    """The library, switched on with the best instructions of this CPU."""
    monkeypatch.setenv("LOFTQ_CACHE", built_cache)
    monkeypatch.delenv(ISA, raising=False)
    forget_library()
    found = find_library()
    assert found is not None, why_no_library()
    yield found
    forget_library()


@pytest.fixture(params=[isa for isa in ISAS if isa in UNITS.get(machine(), ANY)])
def isa(request: pytest.FixtureRequest, library: Library, monkeypatch: pytest.MonkeyPatch) -> str:
    """Each instruction set of the library that this CPU has, chosen in turn."""
    if request.param not in library.isas:
        pytest.skip(f"this CPU has {', '.join(library.isas)}")
    monkeypatch.setenv(ISA, request.param)
    return request.param
