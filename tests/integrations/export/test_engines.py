"""Every target read by the engine's own reader: the packed model's logits, adapter included."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
from peft import PeftModel

import exported
import loftq
import zoo
from tolerances import ENGINE_LOGITS

Packed = Callable[..., tuple[Path, Path]]
MIXED: dict[str, Any] = {
    "formats": {"*.down_proj": "sint8-g32-f16", "layers.1.self_attn": "sint2-channel-f16"},
    "skip": ["layers.0.mlp.up_proj"],
}
"""Three widths, and one layer left dense."""


@pytest.fixture(params=["trained", "start"])
def pair(request: pytest.FixtureRequest) -> Callable[[tuple[Path, Path]], tuple[Path, Path | None]]:
    """The output with its trained adapter, or with the start adapter."""

    def choose(made: tuple[Path, Path]) -> tuple[Path, Path | None]:
        return made if request.param == "trained" else (made[0], None)

    return choose


def close(found: torch.Tensor, wanted: torch.Tensor, tolerance: float) -> None:
    """Logits agree to `tolerance` of their largest, and are not simply all the same."""
    assert wanted.std() > 0.1
    assert (found - wanted).abs().max() <= tolerance * wanted.abs().max()


def with_adapter(base: Any, folder: Path) -> Any:
    """The adapter of an export on its base, as PEFT puts it there."""
    return PeftModel.from_pretrained(base, folder / "adapter")


@pytest.mark.parametrize("name", ["nf4-g64-dq", "nf4-g64-f32"])
def test_bitsandbytes(name: str, packed: Packed, pair: Callable, tmp_path: Path) -> None:
    pytest.importorskip("bitsandbytes", reason="bitsandbytes: dev extra")
    out, trained = pair(packed(name))
    loftq.export(out, to="bnb", output=tmp_path / "bnb", adapter=trained)
    base = hf.AutoModelForCausalLM.from_pretrained(tmp_path / "bnb")
    layer = base.model.layers[1].mlp.down_proj
    assert type(layer).__name__ == "Linear4bit"
    assert layer.weight.quant_state.nested == name.endswith("-dq")
    assert type(base.lm_head) is torch.nn.Linear
    for layer in (m for m in base.modules() if type(m).__name__ == "Linear4bit"):
        layer.support_avx512bf16_for_cpu = False  # its kernel multiplies in bfloat16
    wanted = exported.logits(loftq.load(out, adapter=trained))
    close(exported.logits(with_adapter(base, tmp_path / "bnb")), wanted, ENGINE_LOGITS)


@pytest.mark.parametrize("name", ["sint4-g64-f16", "sint3-g32-bf16", "sint8-channel-f16"])
def test_compressed_tensors(name: str, packed: Packed, pair: Callable, tmp_path: Path) -> None:
    pytest.importorskip("compressed_tensors", reason="compressed-tensors: dev extra")
    out, trained = pair(packed(name))
    folder = tmp_path / "ct"
    loftq.export(out, to="compressed-tensors", output=folder, adapter=trained)
    # Loaded in float32, so that what is compared is the weights and not the activations' dtype.
    base = hf.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    base(**base.dummy_inputs)
    wanted = exported.logits(loftq.load(out, adapter=trained))
    close(exported.logits(with_adapter(base, folder)), wanted, ENGINE_LOGITS)


def test_compressed_tensors_of_several_widths(packed: Packed, tmp_path: Path) -> None:
    pytest.importorskip("compressed_tensors", reason="compressed-tensors: dev extra")
    out, trained = packed("sint4-g64-f16", **MIXED)
    folder = tmp_path / "ct"
    loftq.export(out, to="compressed-tensors", output=folder, adapter=trained)
    base = hf.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    base(**base.dummy_inputs)
    wanted = exported.logits(loftq.load(out, adapter=trained))
    close(exported.logits(with_adapter(base, folder)), wanted, ENGINE_LOGITS)


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("sint4-g64-f16", {}),
        ("sint2-g32-f16", {}),
        ("sint3-channel-f16", {}),
        ("sint8-g64-f16", {"skip": ["layers.0.mlp.up_proj", "layers.1.self_attn"]}),
    ],
)
def test_gptq(name: str, options: dict[str, Any], packed: Packed, tmp_path: Path) -> None:
    pytest.importorskip("gptqmodel", reason="gptqmodel and optimum, in an environment of their own")
    out, trained = packed(name, **options)
    loftq.export(out, to="gptq", output=tmp_path / "gptq", adapter=trained)
    base = hf.AutoModelForCausalLM.from_pretrained(
        tmp_path / "gptq",
        dtype=torch.float32,
        device_map="cpu",
        # Its plain kernel; the one for 4 bits that it would choose multiplies in bfloat16.
        quantization_config=hf.GPTQConfig(bits=4, backend="gptq_torch"),
    )
    assert type(base.model.layers[0].mlp.down_proj).__module__.startswith("gptqmodel.")
    # Unpacked, it rounds the product of scale and code to the scales' float16.
    wanted = exported.logits(exported.rounded(out, trained, torch.float16))
    close(exported.logits(with_adapter(base, tmp_path / "gptq")), wanted, ENGINE_LOGITS)


@pytest.mark.parametrize("name", ["sint4-g32-f16", "iq4nl-g32-f16", "sint8-g32-f16"])
def test_gguf_in_transformers(name: str, packed: Packed, tmp_path: Path) -> None:
    pytest.importorskip("gguf", reason="gguf: demo extra")
    out, trained = packed(name)
    loftq.export(out, to="gguf", output=tmp_path / "gguf", adapter=trained)
    base = hf.AutoModelForCausalLM.from_pretrained(
        tmp_path / "gguf", gguf_file="model.gguf", dtype=torch.float32
    )
    # The loader gives a dense model of the packed weights: the adapter of the source goes on it.
    found = exported.logits(PeftModel.from_pretrained(base, trained))
    close(found, exported.logits(loftq.load(out, adapter=trained)), ENGINE_LOGITS)


@pytest.mark.parametrize("rslora", [False, True])
def test_dense_takes_the_rank_and_alpha_of_each_layer(
    rslora: bool, model: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    loftq.quantize(
        model, out, rank=4, alpha=6, rslora=rslora, bits=3, allocation="error", ranks=(2, 8)
    )
    trained = exported.train(out, tmp_path / "trained")
    config = json.loads((trained / "adapter_config.json").read_text())
    assert set(config["rank_pattern"].values()) <= {2, 8}
    alphas = {"q_proj": 40.0, "0.mlp.up_proj": 1.0, **config["alpha_pattern"]}
    exported.change_config(trained, alpha_pattern=alphas)  # the start's factor is one for all
    loftq.export(out, to="dense", output=tmp_path / "dense", adapter=trained)
    found = hf.AutoModelForCausalLM.from_pretrained(tmp_path / "dense")
    close(exported.logits(found), exported.logits(loftq.load(out, adapter=trained)), ENGINE_LOGITS)


def test_dense_is_merged_from_the_packed_weights(
    packed: Packed, pair: Callable, tmp_path: Path
) -> None:
    out, trained = pair(packed("nf2-g64-dq"))
    loftq.export(out, to="dense", output=tmp_path / "dense", adapter=trained)
    found = hf.AutoModelForCausalLM.from_pretrained(tmp_path / "dense")
    assert not hasattr(found.config, "quantization_config")
    wanted = exported.logits(loftq.load(out, adapter=trained))
    close(exported.logits(found), wanted, ENGINE_LOGITS)


@pytest.mark.parametrize(
    ("name", "options"),
    [("llama-tied", {}), ("llama", {"embeddings": True}), ("bert", {"embeddings": True})],
)
def test_dense_with_embeddings_ties_and_trained_heads(
    name: str, options: dict[str, Any], tmp_path: Path
) -> None:
    model = zoo.save(zoo.build(name), tmp_path / "model")
    out = exported.pack(model, tmp_path / "out", format="nf3-g64-dq", **options)
    trained = loftq.load(out, trainable=True)
    generator = torch.Generator().manual_seed(2)
    for parameter in trained.parameters():
        if parameter.requires_grad:
            parameter.data += 0.05 * torch.randn(parameter.shape, generator=generator)
    trained.save_pretrained(tmp_path / "trained")  # as any trainer does: for BERT with the head
    loftq.export(out, to="dense", output=tmp_path / "dense", adapter=tmp_path / "trained")
    dense = zoo.ZOO[name].auto.from_pretrained(tmp_path / "dense").eval()
    inputs = {key: t for key, t in zoo.ZOO[name].inputs().items() if key != "labels"}
    with torch.no_grad():
        found, wanted = dense(**inputs).logits, trained.eval()(**inputs).logits
        start = loftq.load(out).eval()(**inputs).logits
    assert (found - wanted).abs().max() <= ENGINE_LOGITS * wanted.abs().max()
    assert (start - wanted).abs().max() > 100 * ENGINE_LOGITS * wanted.abs().max()


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_dense_is_rounded_once(dtype: str, packed: Packed, tmp_path: Path) -> None:
    out, trained = packed("nf2-g64-dq")
    for name in ("float32", dtype):
        loftq.export(out, to="dense", output=tmp_path / name, adapter=trained, dtype=name)
    whole = hf.AutoModelForCausalLM.from_pretrained(tmp_path / "float32")
    half = hf.AutoModelForCausalLM.from_pretrained(tmp_path / dtype)
    assert half.dtype == getattr(torch, dtype)
    wanted = whole.to(half.dtype).state_dict()
    assert all(torch.equal(tensor, wanted[key]) for key, tensor in half.state_dict().items())


@pytest.mark.parametrize(
    ("name", "target"),
    [
        ("nf4-g64-dq", "bnb"),
        ("sint4-g64-f16", "compressed-tensors"),
        ("nf4-g64-dq", "lora"),
        ("nf4-g64-dq", "dense"),
    ],
)
def test_the_command_for_transformers_runs(
    name: str, target: str, packed: Packed, tmp_path: Path
) -> None:
    for package in {"bnb": ["bitsandbytes"], "compressed-tensors": ["compressed_tensors"]}.get(
        target, []
    ):
        pytest.importorskip(package, reason=f"{package}: dev extra")
    out, trained = packed(name)
    done = loftq.export(out, to=target, output=tmp_path / "out", adapter=trained)
    command = next(place.command for place in done.serve if place.engine == "transformers")
    names: dict[str, Any] = {}
    exec(command, names)
    found = exported.logits(names["model"])
    assert found.shape == (2, 24, 320)
    assert torch.isfinite(found).all()
    assert type(names["model"]).__name__ == ("LlamaForCausalLM" if target == "dense" else
                                             "PeftModelForCausalLM")  # fmt: skip


def test_the_record_says_what_was_compared(packed: Packed, tmp_path: Path) -> None:
    out, trained = packed("nf4-g64-dq")
    steps: list[tuple[int, int]] = []
    done = loftq.export(
        out, to="bnb", output=tmp_path / "bnb", adapter=trained,
        on_step=lambda n, total: steps.append((n, total)),
    )  # fmt: skip
    record = json.loads((tmp_path / "bnb" / "loftq_export.json").read_text())
    assert record["compared"] == done.compared == 14 + 7 + 28  # packed, copied, adapter tensors
    assert [n for n, _ in steps] == list(range(1, 2 * done.compared + 1))
    assert {total for _, total in steps} == {2 * done.compared}
    assert record["backbone"] == json.loads((out / "loftq.json").read_text())["backbone"]
    assert record["adapter"]["trained"] is True
    assert done.nbytes == sum(p.stat().st_size for p in (tmp_path / "bnb").rglob("*.*"))
    assert str(tmp_path) not in json.dumps({**record, "serve": None})
