"""An output of `quantize`, a run on it, and the models they come from."""

import shutil
from pathlib import Path

import pytest

import loftq
import zoo
from trained_run import write_run


@pytest.fixture(scope="session")
def _work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("page")
    zoo.save(zoo.build("llama"), folder / "source")
    loftq.quantize(folder / "source", folder / "out", rank=4, bits=2)
    write_run(folder / "run", folder / "out")
    return folder


@pytest.fixture
def packed(_work: Path, tmp_path: Path) -> Path:
    """A copy of the output; its source is where it was."""
    return Path(shutil.copytree(_work / "out", tmp_path / "packed"))


@pytest.fixture
def run(_work: Path, tmp_path: Path) -> Path:
    """A copy of the run, on the output that is not copied."""
    return Path(shutil.copytree(_work / "run", tmp_path / "run"))
