"""Singular values of the residuals agree with an SVD and with the recorded errors."""

import math
import shutil
from pathlib import Path

import pytest
import torch

import loftq
import zoo
from loftq.report.output import OutputFiles
from loftq.report.spectra import (
    MOST_WORK,
    SourceMissing,
    Spectrum,
    _values,
    origin_of,
    residual_spectra,
    typical_layers,
)

RANK = 4


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return zoo.save(zoo.build("llama"), tmp_path_factory.mktemp("spectra") / "source")


@pytest.fixture(scope="module")
def files(source: Path) -> OutputFiles:
    out = source.parent / "out"
    loftq.quantize(source, out, rank=RANK, bits=2, alpha=2 * RANK)
    return OutputFiles.open(out)


@pytest.fixture(scope="module")
def spectra(files: OutputFiles) -> tuple[Spectrum, ...]:
    return residual_spectra(files, origin_of(files), [x.info.module for x in files.layers])


@pytest.mark.parametrize("shape", [(1, 5), (5, 1), (7, 12), (12, 7), (9, 9)])
def test_values_are_those_of_an_svd(shape: tuple[int, int], generator: torch.Generator) -> None:
    E = torch.randn(shape, generator=generator, dtype=torch.float64)
    torch.testing.assert_close(_values(E), torch.linalg.svdvals(E), rtol=1e-9, atol=1e-9)


def test_the_root_of_the_sum_of_squares_is_the_recorded_error(
    files: OutputFiles, spectra: tuple[Spectrum, ...]
) -> None:
    for layer, spectrum in zip(files.layers, spectra, strict=True):
        assert math.hypot(*spectrum.adapted) == pytest.approx(layer.record["error"], rel=1e-5)
        assert math.hypot(*spectrum.plain) == pytest.approx(layer.record["plain_error"], rel=1e-5)
        assert list(spectrum.adapted) == sorted(spectrum.adapted, reverse=True)


def test_typical_layers_are_the_worst_the_middle_and_the_best(files: OutputFiles) -> None:
    errors = {x.info.module: x.record["error"] for x in files.layers}
    worst, middle, best = typical_layers(files)
    assert errors[worst] == max(errors.values())
    assert errors[best] == min(errors.values())
    assert errors[best] < errors[middle] < errors[worst]


def test_large_layers_are_passed_over(files: OutputFiles, monkeypatch: pytest.MonkeyPatch) -> None:
    square = [x for x in files.layers if x.info.shape == (zoo.WIDTH, zoo.WIDTH)]
    assert MOST_WORK > 4096**3
    monkeypatch.setattr("loftq.report.spectra.MOST_WORK", zoo.WIDTH**3)
    assert set(typical_layers(files)) <= {
        x.info.module for x in files.layers if x.weights * min(x.info.shape) <= zoo.WIDTH**3
    }
    assert square
    monkeypatch.setattr("loftq.report.spectra.MOST_WORK", 1)
    (only,) = typical_layers(files)
    smallest = min(files.layers, key=lambda x: x.weights * min(x.info.shape))
    assert only == smallest.info.module


def test_an_unknown_layer_is_refused(files: OutputFiles) -> None:
    with pytest.raises(ValueError, match=r"model\.layers\.9: no packed layer of"):
        residual_spectra(files, origin_of(files), ["model.layers.9"])


def test_another_source_is_told_apart(files: OutputFiles, tmp_path: Path) -> None:
    other = zoo.save(zoo.build("llama", seed=1), tmp_path / "other")
    with pytest.raises(SourceMissing, match="fingerprint differs"):
        origin_of(files, str(other))


@pytest.mark.parametrize("name", ["/no/such/folder", "org/never-downloaded"])
def test_an_absent_source_is_said(files: OutputFiles, name: str) -> None:
    with pytest.raises(SourceMissing, match=f"{name}, is not on this machine"):
        origin_of(files, name)


def test_a_damaged_source_is_said(files: OutputFiles, source: Path, tmp_path: Path) -> None:
    damaged = Path(shutil.copytree(source, tmp_path / "damaged"))
    (damaged / "model.safetensors").write_bytes(b"nothing")
    with pytest.raises(SourceMissing, match="cannot be read"):
        origin_of(files, str(damaged))
