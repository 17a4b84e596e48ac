"""Writing: the same bytes however often the process is killed; refusals say what to do."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from loftq.checkpoint import (
    DTYPE_NAMES,
    CheckpointError,
    CheckpointWriter,
    ShardFile,
    TensorSpec,
    open_checkpoint,
    plan_shards,
)

INDEX = "loftq.safetensors.index.json"
ADAPTER = "init_adapter/adapter_model.safetensors"
SETTINGS = {"bits": 2, "rank": 16}


def example() -> dict[str, dict[str, torch.Tensor]]:
    """Batch -> its tensors; 'adapter.*' go to the adapter file."""
    generator = torch.Generator().manual_seed(0)
    batches: dict[str, dict[str, torch.Tensor]] = {}
    for k in range(4):
        batches[f"b{k}"] = {
            f"layer{k}.weight_packed": torch.randint(0, 255, (33, 9), generator=generator).byte(),
            f"layer{k}.norm": torch.randn(17, generator=generator).to(torch.bfloat16),
            f"adapter{k}.lora_A": torch.randn(2, 5, generator=generator),
        }
    return batches


def planned(batches: dict[str, dict[str, torch.Tensor]]) -> list[ShardFile]:
    specs = [
        TensorSpec(name, DTYPE_NAMES[tensor.dtype], tuple(tensor.shape))
        for tensors in batches.values()
        for name, tensor in tensors.items()
    ]
    adapter = [spec for spec in specs if spec.name.startswith("adapter")]
    model = [spec for spec in specs if not spec.name.startswith("adapter")]
    shards = plan_shards(model, prefix="loftq", max_shard_bytes=640)
    return [*shards, ShardFile.plan(ADAPTER, adapter)]


def start(folder: Path, fingerprint: str = "f1", **settings: Any) -> CheckpointWriter:
    describe = SETTINGS | settings
    shards = planned(example())
    return CheckpointWriter(folder, shards, folder / ".journal", fingerprint, describe=describe)


def produce(folder: Path, pause: float = 0.0) -> None:
    """What a pipeline does: the same calls, whatever happened before."""
    if (folder / "config.json").exists() and not (folder / ".journal").exists():
        return
    with start(folder) as writer:
        for batch, tensors in example().items():
            if batch in writer.done:
                continue
            for name, tensor in tensors.items():
                writer.write(name, tensor)
            writer.commit(batch, {"error": 1 / 3, "ranks": (1, 2), 5: "five"})
            time.sleep(pause)
        report = {"hashes": writer.hashes(), "records": writer.records()}
        writer.finish(
            {
                "init_adapter/adapter_config.json": b"{}\n",
                "loftq.json": json.dumps(report).encode(),
                "config.json": b'{"quantization_config": {}}\n',
            }
        )


def tree(folder: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    folder = tmp_path_factory.mktemp("finished")
    produce(folder)
    return tree(folder)


def test_output_loads_with_the_library_and_our_reader(tmp_path: Path) -> None:
    produce(tmp_path)
    tensors = {name: t for batch in example().values() for name, t in batch.items()}
    loaded = {}
    for path in tmp_path.rglob("*.safetensors"):
        loaded |= load_file(path)
    assert loaded.keys() == tensors.keys()
    checkpoint = open_checkpoint(tmp_path, weights=INDEX)
    hashes = json.loads((tmp_path / "loftq.json").read_bytes())["hashes"]
    assert hashes.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert loaded[name].dtype == tensor.dtype
        assert torch.equal(loaded[name], tensor)
        raw = bytes(tensor.flatten().view(torch.uint8).tolist())
        assert hashes[name] == hashlib.sha256(raw).hexdigest()
        if not name.startswith("adapter"):
            assert checkpoint.sha256(name) == hashes[name]
    assert (tmp_path / INDEX).stat().st_mode & 0o111 == 0
    assert (tmp_path / "loftq-00001-of-00003.safetensors").stat().st_mode & 0o111 == 0


def test_only_final_names_remain(finished: dict[str, bytes]) -> None:
    assert list(finished) == [
        "config.json",
        "init_adapter/adapter_config.json",
        ADAPTER,
        "loftq-00001-of-00003.safetensors",
        "loftq-00002-of-00003.safetensors",
        "loftq-00003-of-00003.safetensors",
        "loftq.json",
        INDEX,
    ]


def test_bytes_copied_from_a_source_equal_the_tensor(tmp_path: Path) -> None:
    produce(tmp_path / "source")
    source = open_checkpoint(tmp_path / "source", weights=INDEX)
    specs = [TensorSpec(e.name, e.dtype, e.shape) for e in source.tensors.values()]
    shards = plan_shards(specs, prefix="model")
    with CheckpointWriter(tmp_path / "copy", shards, tmp_path / "journal", "f") as writer:
        with ThreadPoolExecutor(4) as pool:
            copies = [pool.submit(writer.write_bytes, n, source.read_bytes(n)) for n in
                      source.tensors]  # fmt: skip
            assert [copy.result() for copy in copies] == [None] * len(copies)
        writer.commit("all", {})
        writer.finish({})
    copy = open_checkpoint(tmp_path / "copy", weights="model.safetensors.index.json")
    assert {n: copy.sha256(n) for n in copy.tensors} == {
        n: source.sha256(n) for n in source.tensors
    }


def test_empty_and_strange_tensors_are_written(tmp_path: Path) -> None:
    tensors = {
        "empty": torch.empty(0, 4),
        "scalar": torch.tensor(True),
        "complex": torch.complex(torch.ones(3), torch.zeros(3)),
        "float8": torch.ones(3).to(torch.float8_e4m3fn),
        "parameter": torch.nn.Parameter(torch.ones(2, 2)),
    }
    specs = [TensorSpec(n, DTYPE_NAMES[t.dtype], tuple(t.shape)) for n, t in tensors.items()]
    shard = ShardFile.plan("model.safetensors", specs)
    with CheckpointWriter(tmp_path, [shard], tmp_path / "journal", "f") as writer:
        for name, tensor in tensors.items():
            writer.write(name, tensor)
        writer.commit("all", {})
        writer.finish({})
    checkpoint = open_checkpoint(tmp_path)
    for name, tensor in tensors.items():
        assert checkpoint.read(name).shape == tensor.shape
        assert bytes(checkpoint.read_bytes(name)) == bytes(
            tensor.detach().reshape(-1).view(torch.uint8).tolist()
        )


@pytest.mark.parametrize(
    ("name", "tensor", "message"),
    [
        ("nobody", torch.ones(2), "not a tensor of the planned files"),
        ("layer0.norm", torch.ones(17), r"torch.float32.*planned.*torch.bfloat16"),
        ("layer0.norm", torch.ones(18).bfloat16(), r"\(18,\).*planned \(\(17,\)"),
        ("layer0.norm", torch.ones(17, device="meta").bfloat16(), "'meta'"),
        ("layer0.norm", torch.ones(34).bfloat16()[::2], "not contiguous"),
    ],
)
def test_tensor_unlike_its_plan_is_refused(
    tmp_path: Path, name: str, tensor: torch.Tensor, message: str
) -> None:
    with start(tmp_path) as writer, pytest.raises(ValueError, match=message):
        writer.write(name, tensor)


def test_wrong_order_of_calls_is_refused(tmp_path: Path) -> None:
    tensors = example()["b0"]
    with start(tmp_path) as writer:
        with pytest.raises(ValueError, match="got 3 bytes, planned 34"):
            writer.write_bytes("layer0.norm", b"abc")
        for name, tensor in tensors.items():
            writer.write(name, tensor)
        writer.commit("b0", {})
        with pytest.raises(ValueError, match="'b0' is committed already"):
            writer.commit("b0", {})
        with pytest.raises(ValueError, match="committed already"):
            writer.write("layer0.norm", tensors["layer0.norm"])
        with pytest.raises(ValueError, match=r"9 tensors not committed: layer1\.weight_packed"):
            writer.finish({})
    with pytest.raises(ValueError, match="distinct names"):
        CheckpointWriter(tmp_path, [planned(example())[0]] * 2, tmp_path / "j", "f")
    with pytest.raises(ValueError, match="distinct names"):
        CheckpointWriter(tmp_path, [], tmp_path / "j", "f")


def test_space_is_reserved_before_the_first_tensor(tmp_path: Path) -> None:
    with start(tmp_path):
        for shard in planned(example()):
            stat = (tmp_path / f"{shard.filename}.partial").stat()
            assert stat.st_size == shard.nbytes
            assert stat.st_blocks * 512 >= shard.nbytes


def test_batches_may_be_written_in_any_order(tmp_path: Path, finished: dict[str, bytes]) -> None:
    with start(tmp_path) as writer:
        for batch, tensors in reversed(example().items()):
            for name, tensor in reversed(tensors.items()):
                writer.write(name, tensor)
            writer.commit(batch, {})
        writer.finish({})
    assert tree(tmp_path).items() <= finished.items()


def test_an_earlier_output_is_replaced_whole(tmp_path: Path, finished: dict[str, bytes]) -> None:
    produce(tmp_path)
    (tmp_path / "config.json").write_bytes(b"old")
    with start(tmp_path) as writer:
        for batch, tensors in example().items():
            for name, tensor in tensors.items():
                writer.write(name, tensor)
            writer.commit(batch, {})
        assert (tmp_path / "config.json").read_bytes() == b"old"
        writer.finish({"config.json": b"new"})
    assert tree(tmp_path) == finished | {"config.json": b"new"}


# --- killed ---------------------------------------------------------------------------------------

EVENTS = ("open", "pwrite", "fsync", "ftruncate", "posix_fallocate", "replace", "unlink")


def die_at(event: int) -> None:
    """Make this process kill itself in the middle of its `event`-th change to the disk."""
    seen = 0

    def watched(real: Callable[..., Any], name: str) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            nonlocal seen
            seen += 1
            if seen == event:
                if name == "pwrite":
                    real(args[0], args[1][: len(args[1]) // 2], args[2])
                os.kill(os.getpid(), signal.SIGKILL)
            return real(*args, **kwargs)

        return call

    for name in EVENTS:
        if hasattr(os, name):
            setattr(os, name, watched(getattr(os, name), name))


def killed_at(folder: Path, event: int) -> bool:
    """Produce in a child that SIGKILLs itself at `event`; False if it ended before that."""
    child = os.fork()
    if child == 0:
        try:
            die_at(event)
            produce(folder)
            os._exit(0)
        except BaseException:
            os._exit(1)
    status = os.waitpid(child, 0)[1]
    assert status in (0, signal.SIGKILL), f"event {event}: status {status}"
    return status == signal.SIGKILL


@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_sigkill_at_every_step_then_again_gives_the_same_bytes(
    tmp_path: Path, finished: dict[str, bytes]
) -> None:
    event = 1
    while killed_at(tmp_path / str(event), event):
        folder = tmp_path / str(event)
        assert not (folder / "config.json").exists() or (folder / INDEX).exists()
        produce(folder)
        assert tree(folder) == finished, f"killed at event {event}"
        event += 1
    assert event > 80


@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_killed_again_and_again_still_ends_in_the_same_bytes(
    tmp_path: Path, finished: dict[str, bytes]
) -> None:
    event = 4
    while killed_at(tmp_path, event):
        event += 4
    assert event > 40
    assert tree(tmp_path) == finished


@pytest.mark.parametrize("batches", [0, 1, 3])
def test_sigkill_from_outside_then_again_gives_the_same_bytes(
    tmp_path: Path, finished: dict[str, bytes], batches: int
) -> None:
    code = f"import sys; sys.path.insert(0, {str(Path(__file__).parent)!r})\n"
    code += f"import pathlib, test_writer as t; t.produce(pathlib.Path({str(tmp_path)!r}), 0.2)"
    process = subprocess.Popen([sys.executable, "-c", code])
    journal, deadline = tmp_path / ".journal", time.monotonic() + 60
    while not journal.exists() or journal.read_bytes().count(b"\n") < 1 + batches:
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.01)
    process.kill()
    assert process.wait() == -signal.SIGKILL
    with pytest.raises(CheckpointError, match="unfinished output"):
        open_checkpoint(tmp_path)
    produce(tmp_path)
    assert tree(tmp_path) == finished


def test_an_exception_leaves_a_run_that_resumes(tmp_path: Path, finished: dict[str, bytes]) -> None:
    def interrupted() -> None:
        with start(tmp_path) as writer:
            for name, tensor in example()["b0"].items():
                writer.write(name, tensor)
            writer.commit("b0", {"error": 1 / 3, "ranks": (1, 2), 5: "five"})
            writer.write("layer1.norm", example()["b1"]["layer1.norm"])
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    with start(tmp_path) as writer:
        assert writer.done == {"b0"}
        assert writer.records() == {"b0": {"error": 1 / 3, "ranks": [1, 2], "5": "five"}}
        assert writer.hashes().keys() == example()["b0"].keys()
    produce(tmp_path)
    assert tree(tmp_path) == finished


# --- refused --------------------------------------------------------------------------------------


def test_second_process_is_refused_and_a_dead_one_is_not(tmp_path: Path) -> None:
    with start(tmp_path):
        code = (
            "import sys, pathlib; from loftq.checkpoint.durable import ProcessLock\n"
            f"ProcessLock(pathlib.Path({str(tmp_path / '.journal.lock')!r}))"
        )
        run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
        assert run.returncode == 1
        assert f"process {os.getpid()} on" in run.stderr
        assert "is writing here. Wait for it" in run.stderr
        with pytest.raises(CheckpointError, match="is writing here"):
            start(tmp_path)
    (tmp_path / ".journal.lock").write_text("process 1 on a machine that crashed")
    with start(tmp_path) as writer:
        assert writer.done == set()
    assert not (tmp_path / ".journal.lock").exists()


def test_resume_with_other_settings_is_refused_and_says_which(tmp_path: Path) -> None:
    start(tmp_path).close()
    before = tree(tmp_path)
    with pytest.raises(CheckpointError, match=r"bits: 2 then, 4 now; fingerprint: 'f1' then, 'f2'"):
        start(tmp_path, "f2", bits=4)
    with pytest.raises(CheckpointError, match=r"seed: None then, 1 now\).*choose another"):
        start(tmp_path, seed=1)
    other = planned({"b0": example()["b0"]})
    with pytest.raises(CheckpointError, match="layout:"):
        CheckpointWriter(tmp_path, other, tmp_path / ".journal", "f1", describe=SETTINGS)
    assert tree(tmp_path) == before
    assert start(tmp_path).done == set()


@pytest.mark.parametrize("damage", ["gone", "short", "header"])
def test_partial_file_altered_since_is_refused(tmp_path: Path, damage: str) -> None:
    start(tmp_path).close()
    path = tmp_path / "loftq-00002-of-00003.safetensors.partial"
    if damage == "gone":
        path.unlink()
        produce(tmp_path / "other")
        final = tmp_path / "other" / "loftq-00002-of-00003.safetensors"
        (tmp_path / final.name).write_bytes(final.read_bytes())  # of another run: not taken
    elif damage == "short":
        os.truncate(path, 100)
    else:
        path.write_bytes(b"x" * path.stat().st_size)
    with pytest.raises(CheckpointError, match=r"00002-of-00003.*missing or altered"):
        start(tmp_path)


# --- full disk ------------------------------------------------------------------------------------


def fail_after(calls: int, code: int = errno.ENOSPC) -> Callable[[Any], Any]:
    """Wrap an os function so that it fails once `calls` calls have succeeded."""

    def wrap(real: Any) -> Any:
        def call(*args: Any, **kwargs: Any) -> Any:
            nonlocal calls
            calls -= 1
            if calls < 0:
                raise OSError(code, os.strerror(code))
            return real(*args, **kwargs)

        return call

    return wrap


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT])
def test_full_disk_is_found_before_any_work(tmp_path: Path, code: int) -> None:
    needed = sum(shard.nbytes for shard in planned(example()))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "posix_fallocate", fail_after(2, code)(os.posix_fallocate))
        with pytest.raises(CheckpointError, match=rf"{needed} bytes needed, \d+ bytes free"):
            start(tmp_path)
    assert tree(tmp_path) == {}
    start(tmp_path).close()


def test_too_small_disk_is_refused_without_reserving(tmp_path: Path) -> None:
    shard = ShardFile.plan("model.safetensors", [TensorSpec("a", "U8", (2**60,))])
    with pytest.raises(CheckpointError, match=rf"{shard.nbytes} bytes needed, \d+ bytes free"):
        CheckpointWriter(tmp_path, [shard], tmp_path / ".journal", "f")
    assert tree(tmp_path) == {}


@pytest.mark.parametrize("calls", [5, 6, 9, 14, 19, 20, 23])
def test_disk_that_fills_up_later_says_so_and_the_run_resumes(
    tmp_path: Path, finished: dict[str, bytes], calls: int
) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "pwrite", fail_after(calls)(os.pwrite))
        with pytest.raises(CheckpointError, match=r"bytes needed, \d+ bytes free.*it resumes"):
            produce(tmp_path)
    assert not (tmp_path / "config.json").exists()
    produce(tmp_path)
    assert tree(tmp_path) == finished


@pytest.mark.parametrize("missing", [True, False])
def test_systems_that_cannot_reserve_still_write(
    tmp_path: Path, finished: dict[str, bytes], monkeypatch: pytest.MonkeyPatch, missing: bool
) -> None:
    if missing:
        monkeypatch.delattr(os, "posix_fallocate")
    else:
        unsupported = fail_after(0, errno.EOPNOTSUPP)(os.posix_fallocate)
        monkeypatch.setattr(os, "posix_fallocate", unsupported)
    produce(tmp_path)
    assert tree(tmp_path) == finished


def test_unwritable_output_says_what_to_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(CheckpointError, match=r"cannot be written .*Choose an output folder"):
        start(tmp_path / "file")
    monkeypatch.setattr(os, "open", fail_after(0, errno.EROFS)(os.open))
    with pytest.raises(CheckpointError, match=r"cannot be written .Read-only"):
        start(tmp_path)


def test_file_system_without_locks_warns(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fcntl.flock", fail_after(0, errno.ENOLCK)(None))
    with pytest.warns(UserWarning, match="has no locks"):
        start(tmp_path).close()
