import copy
import json
import warnings
from pathlib import Path

import pytest
import torch
import transformers as hf
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn

from loftq.integrations import _hook
from loftq.integrations.peft import (
    LINEAGE_FILE,
    LineageError,
    backbone_of,
    check_lineage,
    load_adapter,
    read_lineage,
    write_lineage,
)
from loftq.nn import QuantLinear, packed_layers
from packed_folder import tiny_llama, write_packed
from tolerances import MERGE_LOGITS

_hook.install()
IDS = torch.arange(3, 23)[None]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("packed") / "out"
    write_packed(tiny_llama(), out)
    return out


def load(folder: Path) -> nn.Module:
    return hf.AutoModelForCausalLM.from_pretrained(folder)


def logits(model: nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model(IDS).logits


def lora(model: nn.Module, seed: int = 0, **options) -> PeftModel:
    """A LoRA on every linear layer with random B, in eval mode."""
    torch.manual_seed(seed)
    options = {"r": 4, "target_modules": "all-linear", "task_type": "CAUSAL_LM"} | options
    peft_model = get_peft_model(model, LoraConfig(**options)).eval()
    for name, parameter in peft_model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.05)
    return peft_model


# Training and saving


def test_stock_lora_finds_every_packed_layer_and_trains_only_itself(folder: Path):
    model = lora(load(folder)).train()
    assert sum(isinstance(m, QuantLinear) for m in model.modules()) == 14
    model(IDS, labels=IDS).loss.backward()
    for name, parameter in model.named_parameters():
        assert (parameter.grad is not None) == ("lora_" in name)


@pytest.mark.parametrize("checkpointing", [None, True, False])
def test_gradients_equal_those_on_the_dense_base(folder: Path, checkpointing: bool | None):
    quant, dense = load(folder), load(folder)
    dense.dequantize()
    grads = []
    for model in (quant, dense):
        model = lora(model.double()).train()
        if checkpointing is not None:
            model.enable_input_require_grads()
            model.gradient_checkpointing_enable({"use_reentrant": checkpointing})
        model(IDS, labels=IDS).loss.backward()
        grads.append({k: p.grad for k, p in model.named_parameters() if p.grad is not None})
    for name, grad in grads[0].items():
        torch.testing.assert_close(grad, grads[1][name], rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("options", [{}, {"use_dora": True}, {"use_rslora": True, "lora_alpha": 3}])
def test_adapters_save_and_load(folder: Path, tmp_path: Path, options: dict):
    model = lora(load(folder), **options)
    wanted = logits(model)
    model.save_pretrained(tmp_path)
    assert {p.name for p in tmp_path.iterdir()} >= {"adapter_model.safetensors"}
    again = PeftModel.from_pretrained(load(folder), str(tmp_path))
    assert torch.equal(logits(again), wanted)
    direct = load(folder)
    direct.load_adapter(str(tmp_path))
    assert torch.equal(logits(direct), wanted)


@pytest.mark.parametrize("init", ["gaussian", "orthogonal"])
def test_inits_that_only_read_the_weight_keep_it_packed(folder: Path, init: str):
    model = lora(load(folder), init_lora_weights=init)
    assert len(packed_layers(model)) == 14


def test_disabling_the_adapter_gives_the_base(folder: Path):
    base = logits(load(folder))
    model = lora(load(folder))
    assert not torch.equal(logits(model), base)
    with model.disable_adapter():
        assert torch.equal(logits(model), base)


# Merging


@pytest.mark.parametrize("safe", [True, False])
@pytest.mark.parametrize("dora", [True, False])
def test_merge_and_unmerge_keep_the_function(folder: Path, safe: bool, dora: bool):
    model = lora(load(folder), use_dora=dora)
    wanted = logits(model)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model.merge_adapter(safe_merge=safe)
    assert not packed_layers(model)
    assert (logits(model) - wanted).abs().max() <= MERGE_LOGITS
    model.unmerge_adapter()
    assert (logits(model) - wanted).abs().max() <= MERGE_LOGITS
    merged = model.merge_and_unload(safe_merge=safe)
    assert {type(m) for m in merged.modules() if isinstance(m, nn.Linear)} == {nn.Linear}
    assert (logits(merged) - wanted).abs().max() <= MERGE_LOGITS


@pytest.mark.parametrize("dora", [True, False])
def test_two_adapters_merge_one_after_the_other(folder: Path, dora: bool):
    model = lora(load(folder), use_dora=dora)
    model.add_adapter("second", LoraConfig(r=2, target_modules="all-linear", use_dora=dora))
    model.base_model.set_adapter(["default", "second"])
    twin = copy.deepcopy(model)
    for layer in packed_layers(twin).values():
        layer.dequantize_()
    model.merge_adapter()
    twin.merge_adapter()
    assert (logits(model) - logits(twin)).abs().max() <= MERGE_LOGITS


def test_a_full_merge_saves_a_stock_model(folder: Path, tmp_path: Path):
    merged = lora(load(folder)).merge_and_unload()
    merged.save_pretrained(tmp_path)
    assert "quantization_config" not in json.loads((tmp_path / "config.json").read_text())
    again = load(tmp_path)
    assert not packed_layers(again)
    assert torch.equal(logits(again), logits(merged))


def test_a_partial_merge_saves_a_partly_packed_model(folder: Path, tmp_path: Path):
    merged = lora(load(folder), target_modules=["q_proj", "down_proj"]).merge_and_unload()
    merged.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())["quantization_config"]
    assert len(config["layers"]) == 10
    assert len(config["modules_to_not_convert"]) == 4
    assert config["backbone"] is None
    again = load(tmp_path)
    assert len(packed_layers(again)) == 10
    assert torch.equal(logits(again), logits(merged))


def test_dequantize_first_merges_to_the_same(folder: Path):
    quant, dense = load(folder), load(folder)
    dense.dequantize()
    found, wanted = (logits(lora(m).merge_and_unload()) for m in (quant, dense))
    assert (found - wanted).abs().max() <= MERGE_LOGITS


@pytest.mark.parametrize("init", ["pissa", "pissa_niter_4", "olora"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_inits_that_rewrite_the_weight_densify_with_a_warning(
    folder: Path, init: str, dtype: torch.dtype
):
    model = hf.AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
    with pytest.warns(UserWarning, match=r"model.layers.0.self_attn.q_proj .*is now dense"):
        peft_model = get_peft_model(
            model, LoraConfig(r=4, target_modules=["q_proj"], init_lora_weights=init)
        )
    assert len(packed_layers(peft_model)) == 12
    if dtype == torch.float32:
        assert (logits(peft_model) - logits(load(folder))).abs().max() <= 10 * MERGE_LOGITS


def test_compiled_peft_model_has_one_graph(folder: Path):
    model = lora(load(folder), target_modules=["q_proj", "up_proj"])
    wanted = logits(model)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(logits(compiled), wanted)


# Lineage


def start_adapter(folder: Path, where: Path) -> Path:
    model = load(folder)
    lora(model).save_pretrained(where)
    write_lineage(where, backbone_of(model))
    return where


def test_an_adapter_of_the_lineage_loads(folder: Path, tmp_path: Path):
    adapter = start_adapter(folder, tmp_path / "a")
    model = load_adapter(load(folder), adapter, trainable=True)
    assert any(p.requires_grad for p in model.parameters())
    frozen = load_adapter(load(folder), adapter)
    assert not any(p.requires_grad for n, p in frozen.named_parameters() if "lora" in n)
    assert torch.equal(logits(frozen), logits(model.eval()))
    stock = PeftModel.from_pretrained(load(folder), str(adapter))
    assert torch.equal(logits(stock), logits(frozen))


def test_an_adapter_of_another_backbone_is_refused(folder: Path, tmp_path: Path):
    write_packed(tiny_llama(), tmp_path / "other", "nf2-g16")
    adapter = start_adapter(folder, tmp_path / "a")
    with pytest.raises(LineageError, match=r"belongs to backbone \w{12}, but the model has \w+ \w"):
        load_adapter(load(tmp_path / "other"), adapter)
    dense = load(folder)
    dense.dequantize()
    with pytest.raises(LineageError, match="has no packed backbone"):
        load_adapter(dense, adapter)


def test_an_adapter_saved_by_peft_is_checked_through_its_base(folder: Path, tmp_path: Path):
    write_packed(tiny_llama(), tmp_path / "other", "nf2-g16")
    adapter = start_adapter(folder, tmp_path / "a")
    trained = load_adapter(load(folder), adapter, trainable=True)
    trained.save_pretrained(tmp_path / "trained")
    assert not (tmp_path / "trained" / LINEAGE_FILE).exists()
    load_adapter(load(folder), tmp_path / "trained")
    with pytest.raises(LineageError, match=rf"Load the model .* {folder}"):
        load_adapter(load(tmp_path / "other"), tmp_path / "trained")


def test_an_adapter_that_says_nothing_loads_with_a_warning(folder: Path, tmp_path: Path):
    adapter = start_adapter(folder, tmp_path / "a")
    (adapter / LINEAGE_FILE).unlink()
    config = json.loads((adapter / "adapter_config.json").read_text())
    (adapter / "adapter_config.json").write_text(
        json.dumps({**config, "base_model_name_or_path": None})
    )
    assert read_lineage(adapter) is None
    with pytest.warns(UserWarning, match="cannot be checked"):
        load_adapter(load(folder), adapter)


def test_a_broken_mark_is_refused(tmp_path: Path):
    (tmp_path / LINEAGE_FILE).write_text('{"version": 7, "backbone": "x"}')
    with pytest.raises(LineageError, match="version 7"):
        check_lineage(tmp_path, "x")
    (tmp_path / LINEAGE_FILE).write_text("{")
    with pytest.raises(LineageError, match="cannot be read"):
        check_lineage(tmp_path, "x")
    with pytest.raises(FileNotFoundError, match=r"no adapter_config\.json"):
        load_adapter(nn.Module(), tmp_path)


# A backbone that needs its adapter


@pytest.fixture
def needy(tmp_path: Path) -> nn.Module:
    write_packed(tiny_llama(), tmp_path / "needy", adapter_required=True)
    (tmp_path / "needy" / "init_adapter").mkdir()
    return load(tmp_path / "needy")


def test_a_forward_without_the_adapter_warns_once_with_the_fix(needy: nn.Module):
    with pytest.warns(UserWarning, match=r"PeftModel.from_pretrained\(model, '.*/init_adapter'"):
        logits(needy)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        logits(needy)
    assert not any(m._forward_pre_hooks for m in needy.modules())


def test_a_fresh_lora_does_not_count(needy: nn.Module):
    model = get_peft_model(needy, LoraConfig(r=2, target_modules=["q_proj"]))
    with pytest.warns(UserWarning, match="a fresh LoRA does not count"):
        logits(model)


@pytest.mark.parametrize("merge", [None, "q_proj", "all-linear"])
def test_an_attached_or_merged_start_is_silent(needy: nn.Module, merge: str | None):
    targets = ["q_proj"] if merge == "q_proj" else "all-linear"
    model = lora(needy, target_modules=targets)
    if merge is not None:
        model = model.merge_and_unload()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        logits(model)


def test_compiling_warns_and_keeps_one_graph(needy: nn.Module):
    compiled = torch.compile(needy, backend="aot_eager", fullgraph=True)
    with pytest.warns(UserWarning, match="init_adapter"):
        first = logits(compiled)
    with torch._dynamo.config.patch(error_on_recompile=True), warnings.catch_warnings():
        warnings.simplefilter("error")
        assert torch.equal(logits(compiled), first)


def test_a_guarded_model_can_be_copied(needy: nn.Module):
    twin = copy.deepcopy(needy)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        logits(twin)
