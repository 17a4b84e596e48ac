"""Reading: what is accepted equals what the safetensors library reads; the rest is refused."""

from __future__ import annotations

import hashlib
import json
import os
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import SafetensorError, safe_open
from safetensors.torch import save, save_file

from loftq.checkpoint import DTYPES, CheckpointError, open_checkpoint

SAVED = [name for name in DTYPES if name != "F8_E8M0"]  # not known to the library's PyTorch side


def example() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {
        "wide.weight": torch.randn(3, 5, generator=generator),
        "half": torch.randn(4, 4, generator=generator).to(torch.bfloat16),
        "bytes": torch.arange(7, dtype=torch.uint8),
        "empty": torch.empty(0, 3),
        "scalar": torch.tensor(2.5),
        "large": torch.randn(300, 100, generator=generator).to(torch.float16),
    }


def build(fields: Any, data: bytes = b"", *, length: int | None = None) -> bytes:
    """A file from its parts, right or wrong."""
    text = fields if isinstance(fields, bytes) else json.dumps(fields).encode()
    return (len(text) if length is None else length).to_bytes(8, "little") + text + data


def f32(*offsets: int, shape: tuple[int, ...] = (2,)) -> dict[str, Any]:
    return {"dtype": "F32", "shape": list(shape), "data_offsets": list(offsets)}


def write_model(folder: Path, content: bytes) -> Path:
    (folder / "model.safetensors").write_bytes(content)
    return folder


def write_sharded(folder: Path) -> dict[str, Any]:
    """Two shards and their index, which is returned for a test to spoil."""
    save_file({"a": torch.ones(2)}, folder / "x-1.safetensors")
    save_file({"b": torch.zeros(3)}, folder / "x-2.safetensors")
    index = {"metadata": {}, "weight_map": {"a": "x-1.safetensors", "b": "x-2.safetensors"}}
    write_index(folder, index)
    return index


def write_index(folder: Path, index: Any) -> None:
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def test_every_tensor_reads_bit_exactly(tmp_path: Path) -> None:
    tensors = example()
    save_file(tensors, tmp_path / "model.safetensors")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        checkpoint = open_checkpoint(tmp_path)
        assert checkpoint.tensors.keys() == tensors.keys()
        for name, tensor in tensors.items():
            read = checkpoint.read(name)
            assert read.dtype == tensor.dtype
            assert torch.equal(read, tensor)
            raw = bytes(tensor.flatten().view(torch.uint8).tolist())
            assert bytes(checkpoint.read_bytes(name)) == raw
            assert checkpoint.sha256(name) == hashlib.sha256(raw).hexdigest()


@pytest.mark.parametrize("dtype", SAVED)
def test_every_dtype_is_read_as_the_library_reads_it(tmp_path: Path, dtype: str) -> None:
    raw = torch.tensor([0, 1] * 24, dtype=torch.uint8)
    save_file({"t": raw.view(DTYPES[dtype])}, tmp_path / "model.safetensors")
    checkpoint = open_checkpoint(tmp_path)
    assert checkpoint.tensors["t"].dtype == dtype
    assert checkpoint.read("t").dtype == DTYPES[dtype]
    assert torch.equal(checkpoint.read("t").view(torch.uint8), raw)


def test_index_and_chosen_weights_are_followed(tmp_path: Path) -> None:
    write_sharded(tmp_path)
    checkpoint = open_checkpoint(tmp_path)
    assert torch.equal(checkpoint.read("a"), torch.ones(2))
    assert checkpoint.tensors["b"].file == "x-2.safetensors"
    assert checkpoint.files["x-1.safetensors"] == (tmp_path / "x-1.safetensors").stat().st_size
    assert list(open_checkpoint(tmp_path, weights="x-1.safetensors").tensors) == ["a"]


def test_writes_to_a_read_tensor_never_reach_the_file(tmp_path: Path) -> None:
    save_file(example(), tmp_path / "model.safetensors")
    before = (tmp_path / "model.safetensors").read_bytes()
    checkpoint = open_checkpoint(tmp_path)
    for name in checkpoint.tensors:
        checkpoint.read(name).zero_()
    assert (tmp_path / "model.safetensors").read_bytes() == before
    assert checkpoint.read_bytes("large").readonly


def test_misaligned_tensors_read_right(tmp_path: Path) -> None:
    values = torch.arange(40_000, dtype=torch.float32)
    data = b"\7" + bytes(values.view(torch.uint8).tolist())
    byte = {"dtype": "U8", "shape": [1], "data_offsets": [0, 1]}
    write_model(tmp_path, build({"u": byte, "v": f32(1, 160_001, shape=(40_000,))}, data))
    read = open_checkpoint(tmp_path).read("v")
    assert torch.equal(read, values)
    assert read.data_ptr() % 4 == 0


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs Linux accounting")
def test_reading_a_large_tensor_takes_no_anonymous_memory(tmp_path: Path) -> None:
    def anonymous() -> int:
        status = Path("/proc/self/status").read_text()
        return int(status.split("RssAnon:")[1].split()[0])

    size = 1 << 28
    header = build({"t": {"dtype": "U8", "shape": [size], "data_offsets": [0, size]}})
    write_model(tmp_path, header)
    os.truncate(tmp_path / "model.safetensors", len(header) + size)  # sparse
    checkpoint = open_checkpoint(tmp_path)
    before, maps = anonymous(), Path("/proc/self/maps").read_text().count("model.safetensors")
    tensor = checkpoint.read("t")
    assert int(tensor[:: 1 << 12].sum()) == 0
    assert hashlib.sha256(checkpoint.read_bytes("t")[: 1 << 24]).digest()
    assert anonymous() - before < 32 * 1024
    del tensor
    assert Path("/proc/self/maps").read_text().count("model.safetensors") == maps


def test_fingerprint_follows_content_not_place(tmp_path: Path) -> None:
    tensors = example()
    prints = []
    for name in ("one", "two", "three"):
        (tmp_path / name).mkdir()
        save_file(tensors, tmp_path / name / "model.safetensors")
        prints.append(open_checkpoint(tmp_path / name).fingerprint())
        if name == "two":
            tensors["wide.weight"] = tensors["wide.weight"] + 1  # a fine-tune: same headers
    assert prints[0] == prints[1] != prints[2]


MALFORMED: dict[str, tuple[bytes, str]] = {
    "empty file": (b"", "0 bytes long"),
    "cut in the length": (b"\1\2\3", "3 bytes long"),
    "huge header length": (build({}, length=2**63), "at most 100000000"),
    "header longer than file": (build({}, length=5000), "in a file of"),
    "not JSON": (build(b"{nonsense}"), "JSON cannot be read"),
    "not UTF-8": (build(b'{"\xff": 1}'), "JSON cannot be read"),
    "lone surrogate": (build(b'{"\\ud800": {}}'), "JSON cannot be read"),
    "deep nesting": (build(b'{"a":' + b"[" * 100_000), "JSON cannot be read"),
    "endless integer": (build(b'{"a": ' + b"9" * 5000 + b"}"), "JSON cannot be read"),
    "not an object": (build([]), "not a JSON object"),
    "duplicate key": (
        build(b'{"a":{"dtype":"U8","shape":[],"data_offsets":[0,1]},"a":{}}', b"x"),
        "duplicate key 'a'",
    ),
    "metadata not strings": (build({"__metadata__": {"a": 1}}), "map of strings"),
    "entry not an object": (build({"a": 3}), "'a': expected exactly"),
    "missing field": (build({"a": {"dtype": "F32", "shape": []}}), "'a': expected exactly"),
    "unknown dtype": (build({"a": f32(0, 8) | {"dtype": "F7"}}, b"x" * 8), "'a' has dtype 'F7'"),
    "dtype not a string": (build({"a": f32(0, 8) | {"dtype": ["F32"]}}, b"x" * 8), "has dtype"),
    "negative size": (build({"a": f32(0, 8, shape=(-2,))}, b"x" * 8), "not a list of sizes"),
    "boolean size": (build({"a": f32(0, 4) | {"shape": [True]}}, b"x" * 4), "list of sizes"),
    "too many sizes": (build({"a": f32(0, 4, shape=(1,) * 65)}, b"x" * 4), "list of sizes"),
    "one offset": (build({"a": f32(8)}, b"x" * 8), r"expected \[begin, end\]"),
    "reversed offsets": (build({"a": f32(8, 0)}, b"x" * 8), r"expected \[begin, end\]"),
    "offsets after the end": (build({"a": f32(0, 8)}, b"x" * 7), "truncated: tensor 'a'"),
    "huge offsets": (build({"a": f32(0, 2**62)}), "truncated: tensor 'a'"),
    "shape and bytes differ": (build({"a": f32(0, 8, shape=(3,))}, b"x" * 8), "needs 12 bytes"),
    "overflowing shape": (build({"a": f32(0, 0, shape=(2**62, 4))}), "'a': F32"),
    "overlap": (build({"a": f32(0, 8), "b": f32(4, 12)}, b"x" * 12), "'b' overlaps"),
    "same place": (build({"a": f32(0, 8), "b": f32(0, 8)}, b"x" * 8), "overlaps another"),
    "gap": (build({"a": f32(0, 8), "b": f32(9, 17)}, b"x" * 17), "'b' follows a gap"),
    "unused tail": (build({"a": f32(0, 8)}, b"x" * 9), "1 bytes after the last tensor"),
}


@pytest.mark.parametrize("case", MALFORMED)
def test_malformed_file_is_refused_by_name(tmp_path: Path, case: str) -> None:
    content, message = MALFORMED[case]
    write_model(tmp_path, content)
    with pytest.raises(CheckpointError, match=message) as caught:
        open_checkpoint(tmp_path)
    assert "model.safetensors" in str(caught.value)
    assert len(str(caught.value)) < 1000


REFERENCE = save(example(), {"format": "pt"})
HEADER_END = 8 + int.from_bytes(REFERENCE[:8], "little")


@settings(max_examples=100, deadline=None)
@given(cut=st.integers(0, len(REFERENCE) - 1))
def test_a_file_cut_anywhere_is_refused(tmp_path_factory: pytest.TempPathFactory, cut: int) -> None:
    folder = write_model(tmp_path_factory.mktemp("cut"), REFERENCE[:cut])
    with pytest.raises(CheckpointError, match=r"model\.safetensors"):
        open_checkpoint(folder)


@settings(max_examples=300, deadline=None)
@given(place=st.integers(0, HEADER_END - 1), flip=st.integers(1, 255))
def test_a_changed_header_byte_is_refused_or_reads_as_the_library_reads_it(
    tmp_path_factory: pytest.TempPathFactory, place: int, flip: int
) -> None:
    content = bytearray(REFERENCE)
    content[place] ^= flip
    folder = write_model(tmp_path_factory.mktemp("flip"), bytes(content))
    try:
        checkpoint = open_checkpoint(folder)
    except CheckpointError:
        return
    try:
        with safe_open(folder / "model.safetensors", "pt") as oracle:
            assert set(oracle.keys()) == checkpoint.tensors.keys()
            for name, entry in checkpoint.tensors.items():
                view = oracle.get_slice(name)
                assert tuple(view.get_shape()) == entry.shape
                assert view.get_dtype() == entry.dtype
    except SafetensorError as error:  # pragma: no cover
        pytest.fail(f"accepted what the library refuses: {error}")


def _one_escapes(index: dict[str, Any], target: str) -> None:
    index["weight_map"]["a"] = target


BAD_INDEX: dict[str, tuple[Callable[[dict[str, Any]], Any], str]] = {
    "parent": (lambda i: _one_escapes(i, "../x-1.safetensors"), "plain file name"),
    "absolute": (lambda i: _one_escapes(i, "/etc/passwd"), "plain file name"),
    "subfolder": (lambda i: _one_escapes(i, "sub/x-1.safetensors"), "plain file name"),
    "backslash": (lambda i: _one_escapes(i, "..\\x-1.safetensors"), "plain file name"),
    "dots": (lambda i: _one_escapes(i, ".."), "plain file name"),
    "missing shard": (lambda i: _one_escapes(i, "x-3.safetensors"), "x-3.safetensors"),
    "tensor in no shard": (lambda i: i["weight_map"].update(c="x-1.safetensors"), "'c'"),
    "tensor in the other shard": (lambda i: _one_escapes(i, "x-2.safetensors"), "'a'"),
    "file not a name": (lambda i: i["weight_map"].update(c=3), "not a file name"),
    "no weight_map": (lambda i: i.pop("weight_map"), "no weight_map"),
    "empty weight_map": (lambda i: i["weight_map"].clear(), "no weight_map"),
}


@pytest.mark.parametrize("case", BAD_INDEX)
def test_bad_index_is_refused(tmp_path: Path, case: str) -> None:
    spoil, message = BAD_INDEX[case]
    index = write_sharded(tmp_path)
    spoil(index)
    write_index(tmp_path, index)
    with pytest.raises(CheckpointError, match=message):
        open_checkpoint(tmp_path)


@pytest.mark.parametrize("text", ["", "{", "[]", "null", '{"weight_map": {"a":"x","a":"y"}}'])
def test_malformed_index_is_refused(tmp_path: Path, text: str) -> None:
    write_sharded(tmp_path)
    (tmp_path / "model.safetensors.index.json").write_text(text)
    with pytest.raises(CheckpointError, match=r"index\.json.*download it again"):
        open_checkpoint(tmp_path)


def test_huge_index_is_refused_unread(tmp_path: Path) -> None:
    write_sharded(tmp_path)
    os.truncate(tmp_path / "model.safetensors.index.json", 10**9)
    with pytest.raises(CheckpointError, match="an index of 1000000000 bytes"):
        open_checkpoint(tmp_path)


def test_tensor_in_two_shards_is_refused(tmp_path: Path) -> None:
    write_sharded(tmp_path)
    save_file({"b": torch.zeros(3), "a": torch.ones(2)}, tmp_path / "x-2.safetensors")
    with pytest.raises(CheckpointError, match=r"'a' is in two files, x-1.*x-2"):
        open_checkpoint(tmp_path)


def test_links_are_followed_inside_the_folder_and_in_a_hub_cache_only(tmp_path: Path) -> None:
    snapshot, blobs = tmp_path / "models--x" / "snapshots" / "rev", tmp_path / "models--x" / "blobs"
    outside = tmp_path / "outside"
    for folder in (snapshot, blobs, outside):
        folder.mkdir(parents=True)
    for folder in (blobs, outside):
        save_file({"a": torch.ones(2)}, folder / "data.safetensors")
    link = snapshot / "model.safetensors"
    link.symlink_to("../../blobs/data.safetensors")
    assert torch.equal(open_checkpoint(snapshot).read("a"), torch.ones(2))
    (tmp_path / "shortcut").symlink_to(snapshot)
    assert list(open_checkpoint(tmp_path / "shortcut").tensors) == ["a"]
    link.unlink()
    link.symlink_to(outside / "data.safetensors")
    with pytest.raises(CheckpointError, match="outside the folder"):
        open_checkpoint(snapshot)


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ([], "no weights"),
        (["pytorch_model.bin"], "only pickle weights.*save_pretrained"),
        (["pytorch_model-00001-of-00002.bin", "pytorch_model.bin.index.json"], "only pickle"),
        (["model.gguf", "config.json"], "only GGUF weights.*gguf_file"),
        (["adapter_model.safetensors", "pytorch_model.bin"], "Name the one to read with weights="),
        (["loftq-00001-of-00001.safetensors.partial"], "unfinished output.*resumes"),
    ],
)
def test_folder_without_safetensors_says_what_to_do(
    tmp_path: Path, files: list[str], message: str
) -> None:
    for file in files:
        (tmp_path / file).write_bytes(b"cposix\nsystem\n(S'touch executed'\ntR.")
    with pytest.raises(CheckpointError, match=message):
        open_checkpoint(tmp_path)


@pytest.mark.parametrize("weights", ["../model.safetensors", "none.safetensors", ""])
def test_wrong_weights_argument_is_refused(tmp_path: Path, weights: str) -> None:
    save_file(example(), tmp_path / "model.safetensors")
    (tmp_path / "sub").mkdir()
    with pytest.raises(CheckpointError, match=r"plain file name|no such file"):
        open_checkpoint(tmp_path / "sub", weights=weights)


def test_not_a_folder_and_unknown_tensor_are_refused(tmp_path: Path) -> None:
    save_file(example(), tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match="not a folder"):
        open_checkpoint(tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match="no tensor 'x' among 6"):
        open_checkpoint(tmp_path).read("x")


def test_file_that_changes_after_opening_is_refused(tmp_path: Path) -> None:
    save_file(example(), tmp_path / "model.safetensors")
    checkpoint = open_checkpoint(tmp_path)
    os.truncate(tmp_path / "model.safetensors", 100)
    with pytest.raises(CheckpointError, match="changed size"):
        checkpoint.read("large")


def test_too_many_held_tensors_says_so(tmp_path: Path) -> None:
    resource = pytest.importorskip("resource")
    save_file({"t": torch.zeros(1 << 17)}, tmp_path / "model.safetensors")
    checkpoint = open_checkpoint(tmp_path)
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (200, hard))
    held = []
    try:
        with pytest.raises(CheckpointError, match="too many open files"):
            held.extend(checkpoint.read("t") for _ in range(200))
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert len(held) > 50
