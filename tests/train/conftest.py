"""A tiny model, its 2-bit output, data, and short runs."""

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

import loftq
import tiny_chat

pytest.importorskip("trl")

SHORT = {"max_length": 48, "chat_template": "chatml", "sample_tokens": 4, "max_steps": 4}


@pytest.fixture(scope="session")
def _made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("train")
    tiny_chat.write_model(folder / "model")
    loftq.quantize(folder / "model", folder / "out", bits=2, rank=4)
    return folder


@pytest.fixture
def model(_made: Path) -> Path:
    """Folder of a tiny Llama with a tokenizer; not to be changed."""
    return _made / "model"


@pytest.fixture
def out(_made: Path, tmp_path: Path) -> Path:
    """Its 2-bit output with adapters of rank 4."""
    return Path(shutil.copytree(_made / "out", tmp_path / "out"))


@pytest.fixture
def chats(tmp_path: Path) -> Path:
    """24 chats."""
    return tiny_chat.write_chats(tmp_path / "chats.jsonl")


@pytest.fixture
def preferences(tmp_path: Path) -> Path:
    """20 preferences."""
    return tiny_chat.write_preferences(tmp_path / "preferences.jsonl")


@pytest.fixture
def train() -> Callable:
    """`loftq.train` for four steps of a short run."""

    def run(model: Path, data: Path, output: Path, **options: object) -> object:
        return loftq.train(model, data, output, device="cpu", **{**SHORT, **options})

    return run
