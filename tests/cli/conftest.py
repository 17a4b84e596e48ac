"""A tiny language model with a tokenizer, its output, and the command line as a function."""

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

import zoo
from loftq.cli.main import main

WORDS = ["one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten"]
RANK = "4"


@dataclass(frozen=True)
class Answer:
    """What a command gave."""

    code: int
    out: str
    err: str

    @property
    def json(self) -> Any:
        """stdout as the one JSON object that it has to be."""
        return json.loads(self.out)


@pytest.fixture
def loftq(
    capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> Callable[..., Answer]:
    """Run the command line in this process, away from any terminal."""
    monkeypatch.delenv("COLUMNS", raising=False)

    def run(*words: object) -> Answer:
        capfd.readouterr()
        code = main([str(word) for word in words])
        out, err = capfd.readouterr()
        assert "Traceback" not in err
        return Answer(code, out, err)

    return run


def add_tokenizer(folder: Path) -> None:
    """A tokenizer of whole words, within the vocabulary of the zoo's models."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocabulary = {word: 5 + i for i, word in enumerate([*WORDS, "<unk>"])}
    words = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, unk_token="<unk>")
    tokenizer.save_pretrained(folder)


@pytest.fixture(scope="session")
def _made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("cli")
    zoo.save(zoo.build("llama"), folder / "model")
    add_tokenizer(folder / "model")
    words = ["quantize", folder / "model", "-o", folder / "out", "--rank", RANK, "--bits", "2"]
    assert main(list(map(str, words))) == 0
    text = "".join(f" {' '.join(WORDS[i % 10 :])} \n" for i in range(40))
    (folder / "wiki.test.raw").write_text(text)
    return folder


@pytest.fixture
def model(_made: Path, tmp_path: Path) -> Path:
    """Folder of a tiny Llama with a tokenizer."""
    return Path(shutil.copytree(_made / "model", tmp_path / "model"))


@pytest.fixture
def out(_made: Path, tmp_path: Path) -> Path:
    """Its 2-bit output."""
    return Path(shutil.copytree(_made / "out", tmp_path / "packed"))


@pytest.fixture
def text(_made: Path) -> Path:
    """A text in the words of the tokenizer."""
    return _made / "wiki.test.raw"
