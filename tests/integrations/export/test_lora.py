"""`--to lora`: the rank-2r adapter carries s B A - s0 B0 A0 exactly, whatever the scalings."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
from peft import PeftModel
from safetensors.torch import load_file, save_file
from torch import Tensor

import exported
import loftq
import zoo
from loftq.integrations.export import ExportError
from tolerances import ENGINE_LOGITS, FLOAT32_ROUNDING

Packed = Callable[..., tuple[Path, Path]]
WEIGHTS = "adapter_model.safetensors"


def updates(folder: Path) -> dict[str, Tensor]:
    """s B A of each layer in float64, computed from the files alone."""
    config = json.loads((folder / "adapter_config.json").read_text())
    root = math.sqrt(config["r"]) if config.get("use_rslora") else config["r"]
    tensors = load_file(folder / WEIGHTS)
    return {
        name: config["lora_alpha"]
        / root
        * (tensors[name.replace("lora_A", "lora_B")].double() @ A.double())
        for name, A in tensors.items()
        if "lora_A" in name
    }


def moved(out: Path, trained: Path) -> dict[str, Tensor]:
    """s B A - s0 B0 A0 of each layer."""
    before = updates(out / exported.START)
    return {name: update - before[name] for name, update in updates(trained).items()}


@pytest.mark.parametrize(
    ("options", "config"),
    [
        ({}, {}),
        ({"alpha": 7}, {}),
        ({"rslora": True}, {}),
        ({}, {"lora_alpha": 10}),
        ({}, {"use_rslora": True, "lora_alpha": 3}),
        ({"rslora": True, "alpha": 9}, {"use_rslora": False, "lora_alpha": 5}),
    ],
)
def test_it_is_what_training_changed(
    options: dict[str, Any], config: dict[str, Any], packed: Packed, tmp_path: Path
) -> None:
    out, _ = packed("nf2-g64-dq", **options)
    trained = exported.train(out, tmp_path / "trained", **config)
    loftq.export(out, to="lora", output=tmp_path / "lora", adapter=trained)
    written = json.loads((tmp_path / "lora" / "adapter_config.json").read_text())
    assert written["r"] == 2 * exported.RANK
    found, wanted = updates(tmp_path / "lora"), moved(out, trained)
    assert found.keys() == wanted.keys()
    for name, update in wanted.items():
        assert (found[name] - update).norm() <= FLOAT32_ROUNDING * update.norm(), name


def test_an_adapter_of_another_rank_stacks_too(packed: Packed, tmp_path: Path) -> None:
    out, _ = packed("nf2-g64-dq")
    trained = shutil.copytree(out / exported.START, tmp_path / "trained")
    generator = torch.Generator().manual_seed(3)
    tensors = {
        name: torch.randn(*(6 if n == exported.RANK else n for n in t.shape), generator=generator)
        for name, t in load_file(trained / WEIGHTS).items()
    }
    save_file(tensors, trained / WEIGHTS, metadata={"format": "pt"})
    exported.change_config(trained, r=6, lora_alpha=12)
    loftq.export(out, to="lora", output=tmp_path / "lora", adapter=trained)
    written = json.loads((tmp_path / "lora" / "adapter_config.json").read_text())
    assert (written["r"], written["lora_alpha"]) == (10, 20)  # r' = r + r0, alpha' = s r'
    found = updates(tmp_path / "lora")
    for name, update in moved(out, trained).items():
        assert (found[name] - update).norm() <= FLOAT32_ROUNDING * update.norm(), name


def test_peft_puts_it_on_the_original_model(model: Path, packed: Packed, tmp_path: Path) -> None:
    out, trained = packed("nf4-g64-dq")
    done = loftq.export(out, to="lora", output=tmp_path / "lora", adapter=trained)
    assert str(model) in done.serve_command
    original = hf.AutoModelForCausalLM.from_pretrained(model)
    for name, update in moved(out, trained).items():
        module = original.get_submodule(name.removeprefix("base_model.model.").split(".lora_A")[0])
        module.weight.data += update.float()
    wanted = exported.logits(original)
    base = hf.AutoModelForCausalLM.from_pretrained(model)
    found = exported.logits(PeftModel.from_pretrained(base, tmp_path / "lora"))
    assert (found - wanted).abs().max() <= ENGINE_LOGITS * wanted.abs().max()
    assert (
        found - exported.logits(hf.AutoModelForCausalLM.from_pretrained(model))
    ).abs().max() > 0.1


def test_base_names_the_original(packed: Packed, tmp_path: Path) -> None:
    out, trained = packed("nf4-g64-dq")
    done = loftq.export(out, to="lora", output=tmp_path / "lora", adapter=trained, base="org/name")
    config = json.loads((tmp_path / "lora" / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == "org/name"
    assert done.serve_command.startswith("vllm serve org/name --enable-lora --lora-modules")
    assert done.serve_command.endswith("--max-lora-rank 8")


def test_embeddings_and_trained_heads_come_along(tmp_path: Path) -> None:
    model = zoo.save(zoo.build("bert"), tmp_path / "model")
    out = exported.pack(model, tmp_path / "out", format="nf4-g64-dq", embeddings=True)
    trained = exported.train(out, tmp_path / "trained")
    packed = loftq.load(out, adapter=trained).eval()
    loftq.export(out, to="lora", output=tmp_path / "lora", adapter=trained)
    base = hf.AutoModelForSequenceClassification.from_pretrained(model)
    lora = PeftModel.from_pretrained(base, tmp_path / "lora").eval()
    start = loftq.load(out).eval()
    inputs = {k: v for k, v in zoo.ZOO["bert"].inputs().items() if k != "labels"}
    with torch.no_grad():
        found, trained_, before = (m(**inputs).logits for m in (lora, packed, start))
        original = hf.AutoModelForSequenceClassification.from_pretrained(model).eval()
        wanted = original(**inputs).logits
    # Not equal: the packed model lacks W - Q - s0 B0 A0. But both moved, and alike.
    assert (found - wanted).norm() > 0
    same = torch.nn.functional.cosine_similarity(
        (found - wanted).flatten(), (trained_ - before).flatten(), dim=0
    )
    assert same > 0.9


def test_nothing_trained_is_refused(packed: Packed, tmp_path: Path) -> None:
    out, _ = packed("nf4-g64-dq")
    with pytest.raises(ExportError, match=r"nothing was trained.*adapter=FOLDER"):
        loftq.export(out, to="lora", output=tmp_path / "lora")
    assert list(tmp_path.iterdir()) == []


def test_a_fresh_adapter_on_other_layers_is_refused(packed: Packed, tmp_path: Path) -> None:
    out, trained = packed("nf4-g64-dq")
    fewer = shutil.copytree(trained, tmp_path / "fewer")
    tensors = load_file(fewer / WEIGHTS)
    kept = {name: t for name, t in tensors.items() if "layers.1.mlp.down_proj" not in name}
    save_file(kept, fewer / WEIGHTS, metadata={"format": "pt"})
    with pytest.raises(
        ExportError, match=r"layers\.1\.mlp\.down_proj is in the start adapter only"
    ):
        loftq.export(out, to="lora", output=tmp_path / "lora", adapter=fewer)


def test_the_highest_rank_of_any_layer_is_served(packed: Packed, tmp_path: Path) -> None:
    """vLLM holds no adapter above the rank that it is started with."""
    out, _ = packed("nf4-g64-dq")
    trained = exported.train(
        out, tmp_path / "trained", rank_pattern={"q_proj": 24}, alpha_pattern={"q_proj": 24}
    )
    done = loftq.export(out, to="bnb", output=tmp_path / "bnb", adapter=trained)
    commands = [place.command for place in done.serve if place.engine == "vllm"]
    assert commands
    assert all("--max-lora-rank 32" in command for command in commands)


@pytest.mark.parametrize(("alpha", "served"), [(24, True), (5, False)])
def test_layers_that_vllm_would_scale_otherwise_are_said(
    alpha: int, served: bool, packed: Packed, tmp_path: Path
) -> None:
    out, _ = packed("nf4-g64-dq")  # alpha = rank: s = 1
    patterns = {"rank_pattern": {"q_proj": 24}, "alpha_pattern": {"q_proj": alpha}}
    trained = exported.train(out, tmp_path / "trained", **patterns)
    done = loftq.export(out, to="bnb", output=tmp_path / "bnb", adapter=trained)
    assert any(place.engine == "vllm" for place in done.serve) == served
    assert any("scales all layers alike" in limit for limit in done.limits) != served


@pytest.mark.parametrize(
    ("config", "what"),
    [
        ({"use_dora": True}, "DoRA"),
        ({"bias": "all"}, "trained biases"),
    ],
)
@pytest.mark.parametrize("target", ["lora", "dense"])
def test_what_is_more_than_b_a_is_refused(
    target: str, config: dict[str, Any], what: str, packed: Packed, tmp_path: Path
) -> None:
    out, _ = packed("nf4-g64-dq")
    trained = exported.train(out, tmp_path / "trained", **config)
    with pytest.raises(ValueError, match=f"adapter_config.json: {what}"):
        loftq.export(out, to=target, output=tmp_path / "export", adapter=trained)


@pytest.mark.parametrize("target", ["lora", "gguf"])
@pytest.mark.parametrize(
    ("config", "what"),
    [
        ({"rank_pattern": {"q_proj": 8}}, "several ranks"),
        ({"alpha_pattern": {"q_proj": 8}}, "several alphas"),
    ],
)
def test_ranks_of_layers_are_refused_where_one_factor_serves_all(
    target: str, config: dict[str, Any], what: str, packed: Packed, tmp_path: Path
) -> None:
    out, _ = packed("iq4nl-g32-f16")
    trained = exported.train(out, tmp_path / "trained", **config)
    with pytest.raises(ValueError, match=f"{what}.*, merge it with --to dense, or train without"):
        loftq.export(out, to=target, output=tmp_path / "export", adapter=trained)
