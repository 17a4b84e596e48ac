"""Recipes: each one trains a tiny model, and copies are the files themselves."""

from pathlib import Path

import pytest

import tiny_chat
from loftq.cli.main import main
from loftq.integrations.metrics import read_metrics
from loftq.lab import cookbook

pytest.importorskip("trl")

DATA = {
    "chat-4bit": tiny_chat.write_chats,
    "chat-2bit": tiny_chat.write_chats,
    "dpo": tiny_chat.write_preferences,
    "text": tiny_chat.write_texts,
}
SMALL = ("max_length=48", "max_steps=2", "sample_tokens=4", "report=false")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_chat.write_model(tmp_path_factory.mktemp("recipes") / "model")


def test_every_recipe_is_tried_here() -> None:
    assert set(cookbook.recipes()) == set(DATA)


@pytest.mark.parametrize("name", sorted(DATA))
def test_a_recipe_trains(name: str, model: Path, tmp_path: Path) -> None:
    data = DATA[name](tmp_path / "data.jsonl")
    recipe = cookbook.copy_recipe(name, tmp_path)
    template = [] if name == "dpo" else ["chat_template=chatml"]
    words = ["train", model, "--config", recipe, "--data", data, "-o", tmp_path / "run"]
    words += ["--rank", 4, f"cache={tmp_path / 'cache'}", *SMALL, *template]
    assert main([str(word) for word in words]) == 0
    found = read_metrics(tmp_path / "run/metrics.jsonl")
    assert found.summary["steps"] == 2
    assert (tmp_path / "run/adapter/adapter_model.safetensors").is_file()


def test_a_copy_is_not_put_over_a_file(tmp_path: Path) -> None:
    path = cookbook.copy_recipe("text", tmp_path / "mine.yaml")
    assert path.read_text() == cookbook.recipes()["text"]
    with pytest.raises(ValueError, match=r"mine\.yaml: exists"):
        cookbook.copy_recipe("text", path)
    with pytest.raises(ValueError, match=r"no recipe 'nothing'. There are chat-2bit, chat-4bit"):
        cookbook.copy_recipe("nothing", tmp_path)


def test_recipes_are_where_a_reader_of_the_repository_looks() -> None:
    shown = Path(__file__).parents[2] / "recipes"
    assert {path.stem for path in shown.glob("*.yaml")} == set(cookbook.recipes())
