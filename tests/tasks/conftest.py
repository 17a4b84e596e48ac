"""Tiny data, and tiny models made once."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import tiny_tasks

for package in ("sklearn", "scipy", "rouge_score"):
    pytest.importorskip(package)

SHORT = {
    "max_steps": 2, "batch_size": 4, "eval_steps": 1, "samples": 1, "bits": 2, "rank": 2,
    "checkpointing": False, "holdout": 0.2, "eval_batch_size": 8, "answer_tokens": 4,
}  # fmt: skip


@pytest.fixture(scope="session")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder as LOFTQ_DATA; not to be changed."""
    return tiny_tasks.write_data(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="session")
def model_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Folder of a tiny random model of the zoo, by name."""
    made: dict[str, Path] = {}

    def find(name: str) -> Path:
        if name not in made:
            made[name] = tiny_tasks.write_model(tmp_path_factory.mktemp("models") / name, name)
        return made[name]

    return find


@pytest.fixture(scope="session")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where quantized backbones are kept, shared by the tests as by a user's runs."""
    return tmp_path_factory.mktemp("packed")


@pytest.fixture
def train(data: Path, cache: Path) -> Callable[..., Any]:
    """`train_task` for two steps."""
    from loftq.tasks import train_task

    def run(model: Path, task: Any, output: Path, **options: Any) -> Any:
        method = options.get("method")
        short = {k: v for k, v in SHORT.items() if not (
            (method in ("full", "lora16") and k == "bits") or (method == "full" and k == "rank")
        )}  # fmt: skip
        chosen = {"data": data, "device": "cpu", "cache": cache, **short, **options}
        return train_task(model, task, output, **chosen)

    return run
