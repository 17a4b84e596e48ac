import json
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch
import transformers as hf
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from loftq.integrations import _hook
from loftq.integrations.config import LoftqConfig
from loftq.integrations.loading import LoadError
from loftq.integrations.transformers import LoftqHfQuantizer, attach
from loftq.nn import QuantLinear, packed_layers
from packed_folder import INDEX, pack_model, tiny_llama, write_packed
from tolerances import MERGE_LOGITS
from zoo import ZOO, build

_hook.install()
IDS = torch.arange(3, 23)[None]


def logits(model: nn.Module, ids: Tensor = IDS) -> Tensor:
    with torch.no_grad():
        return model(ids).logits


def load(folder: Path, **options) -> nn.Module:
    return hf.AutoModelForCausalLM.from_pretrained(folder, **options)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write_packed(tiny_llama(), tmp_path / "out", shards=2)
    return tmp_path / "out"


def stock(folder: Path) -> subprocess.CompletedProcess:
    """What transformers does with the folder in a process that never heard of loftq."""
    script = f"""
from transformers import AutoModelForCausalLM
AutoModelForCausalLM.from_pretrained({str(folder)!r})
"""
    return subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)


# Loading


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_packed_byte_and_every_other_tensor_arrives(
    tmp_path: Path, tied: bool, dtype: torch.dtype
):
    source = tiny_llama(tied=tied, dtype=dtype)
    dense = write_packed(source, tmp_path, "nf3-g32", shards=3)
    model, info = hf.AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info.values())
    assert model.dtype == dtype
    layers = packed_layers(model)
    assert len(layers) == 14
    for path, layer in layers.items():
        assert torch.equal(layer.dequantize(), dense.get_submodule(path).weight)
        assert not any(p.requires_grad for p in layer.parameters())
    for name, tensor in dense.state_dict().items():
        if name.removesuffix(".weight") not in layers:
            assert torch.equal(model.state_dict()[name], tensor)
    again = load(tmp_path)
    assert torch.equal(logits(model), logits(again))
    if dtype == torch.float32:
        assert (logits(model) - logits(dense)).abs().max() <= MERGE_LOGITS


@pytest.mark.parametrize("device_map", ["auto", {"": "cpu"}, "offload"])
def test_device_maps_load_the_same_model(folder: Path, tmp_path: Path, device_map):
    wanted = logits(load(folder))
    options = {"device_map": device_map}
    if device_map == "offload":
        where = {"model.embed_tokens": "cpu", "model.layers.0": "cpu", "model.layers.1": "disk",
                 "model.norm": "cpu", "model.rotary_emb": "cpu", "lm_head": "cpu"}  # fmt: skip
        options = {"device_map": where, "offload_folder": tmp_path / "disk"}
    assert torch.equal(logits(load(folder, **options)), wanted)


def test_requested_dtype_is_the_layers_dtype(folder: Path):
    model = load(folder, dtype=torch.bfloat16)
    assert {layer.weight.dtype for layer in packed_layers(model).values()} == {torch.bfloat16}
    assert logits(model).dtype == torch.bfloat16


def test_a_model_without_its_head_and_back(folder: Path, tmp_path: Path):
    whole = load(folder)
    base = hf.AutoModel.from_pretrained(folder)
    with torch.no_grad():
        assert torch.equal(base(IDS).last_hidden_state, whole.model(IDS).last_hidden_state)
    base.save_pretrained(tmp_path / "base")
    again = hf.AutoModel.from_pretrained(tmp_path / "base")
    assert list(packed_layers(again)) == list(packed_layers(base))
    assert len(packed_layers(load(tmp_path / "base"))) == len(packed_layers(whole))


@pytest.mark.parametrize("name", sorted(ZOO))
def test_every_family_loads_exactly(name: str, tmp_path: Path):
    source = build(name)
    dense = write_packed(source, tmp_path)
    auto = ZOO[name].auto
    model, info = auto.from_pretrained(tmp_path, output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    for path, layer in packed_layers(model).items():
        assert torch.equal(layer.dequantize(), dense.get_submodule(path).weight)
    inputs = ZOO[name].inputs()
    with torch.no_grad():
        found, wanted = model(**inputs), dense(**inputs)
    head = "logits" if "logits" in wanted else "last_hidden_state"
    torch.testing.assert_close(found[head], wanted[head])
    model.save_pretrained(tmp_path / "again")
    again = auto.from_pretrained(tmp_path / "again")
    with torch.no_grad():
        assert torch.equal(again(**inputs)[head], found[head])


def test_modules_kept_in_float32_compute_in_it(tmp_path: Path):
    write_packed(build("t5"), tmp_path)
    model = ZOO["t5"].auto.from_pretrained(tmp_path, dtype=torch.float16)
    for path, layer in packed_layers(model).items():
        assert layer.weight.dtype == (torch.float32 if path.endswith(".wo") else torch.float16)
        assert {p.dtype for p in layer.components().values()} == {torch.uint8}


def test_dequantize_gives_a_stock_model(folder: Path, tmp_path: Path):
    model = load(folder)
    before = logits(model)
    model.dequantize()
    assert not packed_layers(model)
    model.save_pretrained(tmp_path / "dense")
    assert "quantization_config" not in json.loads((tmp_path / "dense/config.json").read_text())
    assert (logits(load(tmp_path / "dense")) - before).abs().max() <= MERGE_LOGITS
    assert stock(tmp_path / "dense").returncode == 0


# Damage


def damage(folder: Path, key: str, change) -> None:
    """Rewrite the shard that holds `key` with the tensor changed, or without it."""
    index = json.loads((folder / INDEX).read_text())
    file = folder / index["weight_map"][key]
    tensors = load_file(file)
    changed = change(tensors.pop(key))
    if changed is not None:
        tensors[key] = changed
    save_file(tensors, file, metadata={"format": "pt"})


UP = "model.layers.1.mlp.up_proj"


def nan_absmax(nested: Tensor) -> Tensor:
    numbers = nested.clone().view(torch.float32)
    numbers[1] = float("nan")
    return numbers.view(torch.uint8)


@pytest.mark.parametrize(
    ("key", "change", "message"),
    [
        (f"{UP}.weight_scale", lambda t: None, rf"{UP}.weight_scale: missing"),
        (f"{UP}.weight_nested", lambda t: None, rf"{UP}.weight_nested: missing"),
        (f"{UP}.weight_packed", lambda t: None, "lists 14 packed layers, .* hold 13"),
        ("model.layers.0.self_attn.q_proj.bias", lambda t: None, "q_proj.bias: missing"),
        (f"{UP}.weight_nested", nan_absmax, rf"{UP}.weight_nested: not finite"),
        (f"{UP}.weight_scale", lambda t: t.float(), rf"{UP}.weight_scale .*dtype F32, expected U8"),
    ],
)
def test_a_damaged_tensor_is_named(folder: Path, key: str, change, message: str):
    damage(folder, key, change)
    with pytest.raises(LoadError, match=message):
        load(folder)


def test_a_packed_tensor_of_another_shape_is_refused(folder: Path):
    damage(folder, f"{UP}.weight_packed", lambda t: t[:, 1:].contiguous())
    with pytest.raises((LoadError, RuntimeError), match=r"weight_packed: found shape|mismatched"):
        load(folder)


def edit_config(folder: Path, **changes) -> None:
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] |= changes
    (folder / "config.json").write_text(json.dumps(config))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"version": 2}, "version=2: this loftq reads up to 1"),
        ({"permutation": "v1"}, "unknown key 'permutation'"),
        ({"weights": "../model.safetensors"}, r"weights='../model.safetensors'"),
        ({"layers": {"a.b": {"format": "nf5", "shape": [4, 4]}}}, r"layers\['a.b'\]: nf: 5 bits"),
        ({"layers": {"a.b": {"format": "nf4", "shape": [4]}}}, r"layers\['a.b'\]: shape \[4\]"),
        ({"layers": {"a.b": {"format": "nf4", "shape": [4, 4], "x": 1}}}, "found keys .*'x'"),
    ],
)
def test_a_config_we_do_not_understand_is_refused(folder: Path, changes: dict, message: str):
    edit_config(folder, **changes)
    with pytest.raises(ValueError, match=message):
        load(folder)


def test_a_config_of_other_weights_is_refused(folder: Path):
    config = json.loads((folder / "config.json").read_text())["quantization_config"]
    entry = config["layers"].pop(UP)
    edit_config(folder, layers=config["layers"])
    with pytest.raises(LoadError, match=r"lists 13 packed layers, .* hold 14"):
        load(folder)
    edit_config(folder, layers={**config["layers"], UP: {**entry, "shape": [80, 40]}})
    with pytest.raises(ValueError, match=rf"{UP}: the model has a weight of shape \(80, 48\)"):
        load(folder)


def test_another_architecture_is_refused(folder: Path):
    with pytest.raises(ValueError, match=r"none of the 14 packed modules"):
        hf.BertModel.from_pretrained(folder, config=hf.BertConfig(
            hidden_size=48, num_hidden_layers=1, num_attention_heads=4, intermediate_size=80,
            quantization_config=json.loads((folder / "config.json").read_text())[
                "quantization_config"
            ],
        ))  # fmt: skip


# Guards


def test_stock_transformers_stops_instead_of_loading_random_weights(folder: Path):
    result = stock(folder)
    assert result.returncode != 0
    assert "no file named" in result.stderr


def test_a_model_saved_again_keeps_the_guard(folder: Path, tmp_path: Path):
    model = load(folder)
    model.save_pretrained(tmp_path / "again", max_shard_size="20KB")
    again = load(tmp_path / "again")
    assert torch.equal(logits(again), logits(model))
    assert again.config.quantization_config.backbone == model.config.quantization_config.backbone
    result = stock(tmp_path / "again")
    assert result.returncode != 0
    assert "ignore_mismatched_sizes" in result.stderr
    again.save_pretrained(tmp_path / "third")
    assert torch.equal(logits(load(tmp_path / "third")), logits(model))


def test_quantizing_while_loading_is_refused_with_the_way_to_do_it(tmp_path: Path):
    tiny_llama().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"loftq quantize.*quantize_model"):
        load(tmp_path, quantization_config=LoftqConfig())


@pytest.mark.parametrize("device_map", ["auto", {"a": 0, "b": 1}])
def test_spreading_devices_under_a_launcher_is_refused(folder: Path, monkeypatch, device_map):
    monkeypatch.setenv("WORLD_SIZE", "2")
    quantizer = LoftqHfQuantizer(LoftqConfig(), pre_quantized=True)
    with pytest.raises(ValueError, match=r"device_map=.* under 2 processes.*local_rank"):
        quantizer.validate_environment(device_map=device_map)
    quantizer.validate_environment(device_map={"": 1})


def test_tensor_parallelism_is_refused(folder: Path):
    model = tiny_llama()
    model.config.distributed_config = type("Config", (), {"tp_size": 2})()
    quantizer = LoftqHfQuantizer(LoftqConfig(), pre_quantized=True)
    with pytest.raises(ValueError, match=r"tp_size=2: .*FSDP2"):
        quantizer.preprocess_model(model)


def test_a_packed_head_tied_to_a_dense_embedding_is_refused(tmp_path: Path):
    write_packed(tiny_llama(tied=True), tmp_path)
    path = tmp_path / "config.json"
    config = json.loads(path.read_text())
    layers = config["quantization_config"]["layers"]
    layers["lm_head"] = layers.pop("model.layers.0.mlp.up_proj")
    layers["lm_head"]["shape"] = [97, 48]
    path.write_text(json.dumps(config))
    with pytest.raises(ValueError, match=r"lm_head is packed.*which is not"):
        load(tmp_path)


# In memory and initialisation


def test_a_model_packed_in_memory_saves_like_a_loaded_one(tmp_path: Path):
    source = tiny_llama()
    _, packed = pack_model(source, "int3-g32", embeddings=False)
    for path, weight in packed.items():
        bias = source.get_submodule(path).bias
        source.set_submodule(path, QuantLinear.from_quantized(weight, bias))
    layers = {p: {"format": str(w.spec), "shape": list(w.shape)} for p, w in packed.items()}
    attach(source, LoftqConfig(layers=layers, backbone="abc"))
    source.save_pretrained(tmp_path)
    model = load(tmp_path)
    assert torch.equal(logits(model), logits(source))
    assert model.config.quantization_config.backbone == "abc"
    assert stock(tmp_path).returncode != 0


def test_initialising_a_loaded_model_leaves_packed_layers_alone(folder: Path):
    model = load(folder)
    before = logits(model)
    model.initialize_weights()
    assert torch.equal(logits(model), before)
    packed = {k: v.clone() for k, v in model.state_dict().items() if ".weight_" in k}
    for layer in packed_layers(model).values():
        model._init_weights(layer)  # transformers' init functions see that nothing is missing
    assert all(torch.equal(model.state_dict()[key], value) for key, value in packed.items())


def test_resized_embeddings_and_generation_work(folder: Path):
    model = load(folder)
    model.resize_token_embeddings(99)
    out = model.generate(IDS, max_new_tokens=3, do_sample=False)
    assert out.shape[1] <= IDS.shape[1] + 3


def test_loading_warns_of_nothing(folder: Path, capfd):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        load(folder)
    assert "LOAD REPORT" not in capfd.readouterr().err
