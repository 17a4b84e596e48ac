"""A folder appears complete or not at all; a kill costs little, and nothing foreign is replaced."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

import exported
import loftq
from loftq.checkpoint import CheckpointError
from loftq.integrations.export import ExportError
from loftq.integrations.export import job as job_module

Packed = Callable[..., tuple[Path, Path]]
KILLED = """
import os, signal, sys
import loftq
from loftq.integrations.export import job

job.COMMIT_BYTES = 1
out, trained, target, folder, after = sys.argv[1:]

def step(done, total):
    if done == int(after):
        os.kill(os.getpid(), signal.SIGKILL)

loftq.export(out, to=target, output=folder, adapter=trained, on_step=step)
"""


def content(folder: Path) -> dict[str, bytes]:
    """Every file of a folder."""
    files = (path for path in folder.rglob("*") if path.is_file())
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in files}


class Stopped(RuntimeError):
    """What stands for an interruption."""


@pytest.fixture
def often(monkeypatch: pytest.MonkeyPatch) -> None:
    """Commit after every tensor."""
    monkeypatch.setattr(job_module, "COMMIT_BYTES", 1)


@pytest.mark.parametrize("target", ["bnb", "lora", "dense"])
@pytest.mark.usefixtures("often")
def test_it_goes_on_where_it_was_interrupted(
    target: str, packed: Packed, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, trained = packed("nf4-g64-dq")
    folder = tmp_path / "export"
    whole = loftq.export(out, to=target, output=folder, adapter=trained)
    wanted = content(folder)
    for path in sorted(folder.rglob("*"), reverse=True):
        path.rmdir() if path.is_dir() else path.unlink()
    folder.rmdir()
    half = whole.compared // 2

    def stop(done: int, total: int) -> None:
        if done == half:
            raise Stopped

    with pytest.raises(Stopped):
        loftq.export(out, to=target, output=folder, adapter=trained, on_step=stop)
    assert [path.name for path in tmp_path.iterdir()] == ["export.partial"]
    made: list[object] = []
    write = job_module.CheckpointWriter.write

    def counted(self: object, *rest: object) -> object:
        made.append(rest[0])
        return write(self, *rest)

    monkeypatch.setattr(job_module.CheckpointWriter, "write", counted)
    loftq.export(out, to=target, output=folder, adapter=trained)
    assert content(folder) == wanted
    assert [path.name for path in tmp_path.iterdir()] == ["export"]
    if target == "lora":  # every tensor is written through `write`: the first half was not again
        assert len(made) <= 28 - half + 2


def test_a_killed_export_goes_on_to_the_same_bytes(packed: Packed, tmp_path: Path) -> None:
    out, trained = packed("sint4-g32-f16")
    folder = tmp_path / "export"
    words = [sys.executable, "-c", KILLED, *map(str, (out, trained, "compressed-tensors", folder))]
    killed = subprocess.run([*words, "20"], env=os.environ, capture_output=True, text=True)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    assert not folder.exists()
    loftq.export(out, to="compressed-tensors", output=folder, adapter=trained)
    found = content(folder)
    assert not any("journal" in name or name.startswith(".") for name in found)
    # The whole of it, and not what a second export on top would make of it.
    loftq.export(out, to="compressed-tensors", output=folder, adapter=trained, overwrite=True)
    assert content(folder) == found


def test_a_partial_export_of_something_else_is_in_the_way(packed: Packed, tmp_path: Path) -> None:
    out, trained = packed("nf4-g64-dq")
    stop: Callable[[int, int], object] = lambda done, total: exec("raise KeyboardInterrupt")  # noqa: E731
    with pytest.raises(KeyboardInterrupt):
        loftq.export(out, to="bnb", output=tmp_path / "export", adapter=trained, on_step=stop)
    with pytest.raises(ExportError, match=r"export\.partial: left by an unfinished export of some"):
        loftq.export(out, to="dense", output=tmp_path / "export", adapter=trained)


def test_only_an_earlier_export_is_replaced(packed: Packed, tmp_path: Path) -> None:
    out, trained = packed("nf4-g64-dq")
    folder = tmp_path / "export"
    folder.mkdir()
    loftq.export(out, to="bnb", output=folder)  # an empty folder is as good as none
    with pytest.raises(ExportError, match=r"holds an earlier export\..*--overwrite"):
        loftq.export(out, to="dense", output=folder, adapter=trained)
    loftq.export(out, to="dense", output=folder, adapter=trained, overwrite=True)
    assert not (folder / "adapter").exists()
    assert [path.name for path in tmp_path.iterdir()] == ["export"]
    mine = tmp_path / "mine"
    mine.mkdir()
    (mine / "thesis.txt").write_text("years of work")
    with pytest.raises(ExportError, match="not an export of loftq"):
        loftq.export(out, to="bnb", output=mine, overwrite=True)
    with pytest.raises(ExportError, match=r"thesis\.txt: a file"):
        loftq.export(out, to="bnb", output=mine / "thesis.txt", overwrite=True)
    with pytest.raises(ExportError, match="not an export of loftq"):
        loftq.export(out, to="bnb", output=out, overwrite=True)


def test_a_refused_replacement_keeps_the_old_one(packed: Packed, tmp_path: Path) -> None:
    out, trained = packed("nf4-g64-dq")
    folder = tmp_path / "export"
    loftq.export(out, to="bnb", output=folder)
    before = content(folder)

    def stop(done: int, total: int) -> None:
        if done == total - 1:
            raise Stopped

    with pytest.raises(Stopped):
        loftq.export(out, to="dense", output=folder, adapter=trained, overwrite=True, on_step=stop)
    assert content(folder) == before


@pytest.mark.parametrize("target", ["bnb", "lora", "dense", "gguf"])
def test_what_differs_from_the_source_is_not_published(
    target: str, packed: Packed, tmp_path: Path
) -> None:
    if target == "gguf":
        pytest.importorskip("gguf", reason="gguf: demo extra")
    out, trained = packed("sint4-g32-f16" if target == "gguf" else "nf4-g64-dq")
    folder = tmp_path / "export"

    def spoil(done: int, total: int) -> None:
        if done == total // 2 + 1:  # everything is written, and one tensor compared
            files = sorted((tmp_path / "export.partial").glob("*.safetensors"))
            files += sorted((tmp_path / "export.partial").glob("model.gguf"))
            with files[0].open("r+b") as file:
                file.seek(-3, os.SEEK_END)
                byte = file.read(1)[0]
                file.seek(-3, os.SEEK_END)
                file.write(bytes([byte ^ 1]))

    with pytest.raises((ExportError, CheckpointError), match=r"export again"):
        loftq.export(out, to=target, output=folder, adapter=trained, on_step=spoil)
    assert not folder.exists()
    loftq.export(out, to=target, output=folder, adapter=trained)  # as the message says
    assert [path.name for path in tmp_path.iterdir()] == ["export"]


def test_shards_are_split_at_the_size_asked_for(packed: Packed, tmp_path: Path) -> None:
    import transformers as hf

    out, trained = packed("nf4-g64-dq")
    done = loftq.export(
        out, to="dense", output=tmp_path / "export", adapter=trained, max_shard_bytes=100_000
    )
    shards = [name for name in done.files if name.startswith("model-")]
    assert len(shards) > 2
    assert "model.safetensors.index.json" in done.files
    found = hf.AutoModelForCausalLM.from_pretrained(tmp_path / "export")
    wanted = exported.logits(loftq.load(out, adapter=trained))
    assert (exported.logits(found) - wanted).abs().max() < 1e-4
