"""Layout: the planned header is what the safetensors library reads, and data is aligned."""

from __future__ import annotations

import hashlib
import json

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load

from loftq.checkpoint import DTYPES, ShardFile, TensorSpec, backbone_hash, plan_shards
from loftq.checkpoint.layout import index_files

SPECS = [
    TensorSpec("a.weight_packed", "U8", (3, 7)),
    TensorSpec("b", "F32", (2, 2)),
    TensorSpec('c.é\n"', "BF16", (5,)),
    TensorSpec("scalar", "I64", ()),
    TensorSpec("empty", "F16", (0, 4)),
]


def test_planned_file_loads_with_the_library() -> None:
    shard = ShardFile.plan("x.safetensors", SPECS)
    tensors = load(shard.header_bytes + bytes(shard.nbytes - len(shard.header_bytes)))
    assert {name: tuple(t.shape) for name, t in tensors.items()} == {
        spec.name: spec.shape for spec in SPECS
    }
    assert all(tensors[spec.name].dtype == DTYPES[spec.dtype] for spec in SPECS)
    assert b'"__metadata__":{"format":"pt"}' in shard.header_bytes


@settings(max_examples=50, deadline=None)
@given(
    st.lists(
        st.tuples(st.sampled_from(list(DTYPES)), st.lists(st.integers(0, 9), max_size=3)),
        min_size=1,
        max_size=20,
    ),
    st.integers(1, 500),
)
def test_tensors_tile_the_file_and_are_aligned(
    tensors: list[tuple[str, list[int]]], max_shard_bytes: int
) -> None:
    specs = [TensorSpec(f"t{i}", dtype, tuple(s)) for i, (dtype, s) in enumerate(tensors)]
    shards = plan_shards(specs, prefix="m", max_shard_bytes=max_shard_bytes)
    for shard in shards:
        position = len(shard.header_bytes)
        assert position % 8 == 0
        for entry in shard.tensors.values():
            assert entry.offset_begin == position
            assert position % DTYPES[entry.dtype].itemsize == 0
            position = entry.offset_end
        assert position == shard.nbytes
        data = shard.nbytes - len(shard.header_bytes)
        assert data <= max_shard_bytes or sum(e.nbytes > 0 for e in shard.tensors.values()) == 1
    assert {n for shard in shards for n in shard.tensors} == {spec.name for spec in specs}


def test_shards_keep_the_given_order_and_are_listed_by_one_index() -> None:
    specs = [TensorSpec(f"t{i}", "U8", (40,)) for i in range(5)]
    shards = plan_shards(specs, prefix="loftq", max_shard_bytes=100)
    assert [shard.filename for shard in shards] == [
        f"loftq-0000{k}-of-00003.safetensors" for k in (1, 2, 3)
    ]
    assert [list(shard.tensors) for shard in shards] == [["t0", "t1"], ["t2", "t3"], ["t4"]]
    adapter = ShardFile.plan("init_adapter/adapter_model.safetensors", specs)
    files = index_files([*shards, adapter])
    assert list(files) == ["loftq.safetensors.index.json"]
    index = json.loads(files["loftq.safetensors.index.json"])
    assert index["metadata"]["total_size"] == 200
    assert index["weight_map"]["t3"] == "loftq-00002-of-00003.safetensors"
    assert plan_shards(specs, prefix="loftq", max_shard_bytes=100) == shards


@pytest.mark.parametrize("name", ["../x", "/x", "", "a/../../x"])
def test_file_name_outside_the_output_is_refused(name: str) -> None:
    with pytest.raises(ValueError, match="inside the output folder"):
        ShardFile.plan(name, SPECS)


def test_wrong_plans_are_refused() -> None:
    with pytest.raises(ValueError, match="dtype 'FLOAT' is unknown"):
        TensorSpec("a", "FLOAT", (1,))
    with pytest.raises(ValueError, match="distinct names"):
        plan_shards([SPECS[0], SPECS[0]], prefix="m")
    with pytest.raises(ValueError, match="distinct names"):
        plan_shards([], prefix="m")
    with pytest.raises(ValueError, match="occurs twice"):
        ShardFile.plan("m", [SPECS[0], SPECS[0]])


def test_backbone_hash_sees_packed_tensors_in_any_order() -> None:
    hashes = {"m.weight_packed": "1f", "m.weight_scale": "2e", "norm.weight": "3d"}
    expected = hashlib.sha256(b"m.weight_packed 1f\nm.weight_scale 2e\n").hexdigest()
    found = backbone_hash(hashes)
    assert found == expected
    assert found == backbone_hash(dict(reversed(hashes.items())))
    assert found == backbone_hash(hashes | {"norm.weight": "00"})
    assert found != backbone_hash(hashes | {"m.weight_scale": "00"})


def test_every_dtype_is_known_to_torch() -> None:
    assert all(isinstance(dtype, torch.dtype) for dtype in DTYPES.values())
