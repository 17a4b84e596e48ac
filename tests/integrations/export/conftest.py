"""A tiny model, packed once per format, with a trained adapter."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

import exported

Packed = Callable[..., tuple[Path, Path]]


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of the original model; read only."""
    return exported.write_model(tmp_path_factory.mktemp("original") / "model")


@pytest.fixture(scope="session")
def packed(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Packed:
    """Format (and other options) -> its output and a trained adapter; made once, read only."""
    made: dict[str, tuple[Path, Path]] = {}

    def give(name: str, **options: object) -> tuple[Path, Path]:
        key = f"{name} {options}"
        if key not in made:
            place = tmp_path_factory.mktemp("packed")
            out = exported.pack(model, place / "out", format=name, **options)
            made[key] = out, exported.train(out, place / "trained")
        return made[key]

    return give


@pytest.fixture
def nf4(packed: Packed, tmp_path: Path) -> tuple[Path, Path]:
    """A copy of the NF4 output and its trained adapter, to spoil."""
    out, trained = packed("nf4-g64-dq")
    return (
        Path(shutil.copytree(out, tmp_path / "out")),
        Path(shutil.copytree(trained, tmp_path / "trained")),
    )
