"""Every supported family end to end: quantize, load, adapter, one training step, reload."""

import json

import pytest
import torch
from peft import PeftModel

import loftq
from loftq.checkpoint import open_checkpoint
from loftq.methods.base import relative_error
from loftq.nn import packed_layers
from zoo import ZOO, build, save

OPTIONS = {"format": "nf3-g16", "rank": 4, "allow_uncovered": True}


@pytest.fixture(scope="module", params=sorted(ZOO))
def packed(request, tmp_path_factory):
    """(zoo name, source folder, output folder)."""
    folder = tmp_path_factory.mktemp(request.param)
    source = save(build(request.param), folder / "source")
    loftq.quantize(source, folder / "out", device="cpu", **OPTIONS)
    return request.param, source, folder / "out"


def load(name, folder, trainable=False):
    base = ZOO[name].auto.from_pretrained(folder)
    return PeftModel.from_pretrained(base, folder / "init_adapter", is_trainable=trainable)


def outputs(model, name):
    with torch.no_grad():
        found = model.eval()(**ZOO[name].inputs())
    return found["logits"]


def test_effective_weights_are_those_of_the_record(packed):
    name, source, out = packed
    model, original = load(name, out), open_checkpoint(source)
    records = json.loads((out / "loftq.json").read_text())["layers"]
    assert records
    modules = dict(model.get_base_model().named_modules())
    for record in records:
        layer = modules[record["name"]]
        W = original.read(record["tensor"]).float()
        W = W.mT if record["kind"] == "conv1d" else W
        A, B = layer.lora_A["default"].weight, layer.lora_B["default"].weight
        Q = layer.base_layer.quantized().dequantize()
        error = relative_error(W, Q, B.detach(), A.detach(), layer.scaling["default"])
        assert error == pytest.approx(record["error"], rel=1e-6)
        assert record["error"] < record["plain_error"]


def test_one_training_step_changes_adapters_only_and_reloads_exactly(packed, tmp_path):
    name, _, out = packed
    model = load(name, out, trainable=True).train()
    trainable = [p for p in model.parameters() if p.requires_grad]
    before = {n: p.detach().clone() for n, p in model.named_parameters() if not p.requires_grad}
    optimizer = torch.optim.SGD(trainable, lr=0.1)
    found = model(**ZOO[name].inputs())
    loss = found["loss"] if found.get("loss") is not None else found["logits"].square().mean()
    loss.backward()
    assert all(torch.isfinite(p.grad).all() for p in trainable if p.grad is not None)
    assert any(p.grad is not None and p.grad.any() for p in trainable)
    optimizer.step()
    for key, old in before.items():
        assert torch.equal(dict(model.named_parameters())[key], old), key
    model.save_pretrained(tmp_path / "adapter")
    again = PeftModel.from_pretrained(ZOO[name].auto.from_pretrained(out), tmp_path / "adapter")
    assert torch.equal(outputs(model, name), outputs(again, name))


def test_resaved_backbone_reloads_bit_for_bit(packed, tmp_path):
    name, _, out = packed
    base = ZOO[name].auto.from_pretrained(out)
    base.save_pretrained(tmp_path / "again")
    again = ZOO[name].auto.from_pretrained(tmp_path / "again")
    first, second = packed_layers(base), packed_layers(again)
    assert first.keys() == second.keys()
    for path, layer in first.items():
        for part, tensor in layer.components().items():
            assert torch.equal(tensor, second[path].components()[part]), (path, part)
    assert torch.equal(outputs(base, name), outputs(again, name))


def test_in_memory_and_on_disk_agree(packed):
    name, source, out = packed
    model = ZOO[name].auto.from_pretrained(source)
    in_memory = loftq.quantize_model(model, **OPTIONS)
    assert torch.allclose(outputs(in_memory, name), outputs(load(name, out), name), atol=1e-5)
