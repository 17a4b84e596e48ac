"""What would be rounded again, or get a wrong adapter, is refused with a way out."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

import exported
import loftq
import trained_run
import zoo
from loftq.integrations import engines
from loftq.integrations.export import ENGINES, EXPORTS, ExportError, readers
from loftq.integrations.peft import LineageError
from loftq.integrations.run_folder import RunError
from loftq.pipeline.config import ENGINE_FORMATS

Packed = Callable[..., tuple[Path, Path]]


@pytest.mark.parametrize(
    ("target", "name", "why", "advice"),
    [
        ("bnb", "nf2-g64-dq", "its only 4-bit NormalFloat is nf4", "--format nf4-g64-dq"),
        ("bnb", "nf4-g64-f16", "scales must be -dq or -f32", "--for transformers"),
        ("gptq", "nf4-g64-dq", "needs symmetric integers", "--format sint4-g64-f16"),
        ("gptq", "sint4-g64-bf16", "with float16 scales", "--format sint4-g64-f16"),
        ("compressed-tensors", "int4-g64-f16", "symmetric integers", "--for vllm"),
        ("gguf", "sint4-g64-f16", r"sint4-g32-f16 \(Q4_0\)", "--for llama.cpp"),
    ],
)
def test_a_format_that_does_not_fit_names_the_one_that_does(
    target: str, name: str, why: str, advice: str, packed: Packed, tmp_path: Path
) -> None:
    out, _ = packed(name)
    with pytest.raises(ExportError, match=why) as error:
        loftq.export(out, to=target, output=tmp_path / "export")
    first = "model.layers.0.self_attn.q_proj"
    assert f"{target} cannot hold it: {first} ({name}): " in str(error.value)
    assert advice in str(error.value)
    assert "--to lora" in str(error.value)
    assert list(tmp_path.iterdir()) == []  # nothing is left behind


def test_every_target_of_the_engine_says_why(packed: Packed, tmp_path: Path) -> None:
    out, _ = packed("nf2-g64-dq")
    with pytest.raises(ExportError) as error:
        loftq.export(out, engine="vllm", output=tmp_path / "export")
    for target in ENGINES["vllm"]:
        assert f"{target} cannot hold it: " in str(error.value)
    assert "again with --for vllm" in str(error.value)


@pytest.mark.parametrize("method", ["loftq", "fast", "best"])
@pytest.mark.parametrize("engine", sorted(ENGINES))
def test_quantized_for_an_engine_it_exports_to_it(
    engine: str, method: str, model: Path, tmp_path: Path
) -> None:
    (tmp_path / "some.txt").write_text("\n".join(exported.TEXT) * 8)
    text = {"data": str(tmp_path / "some.txt"), "statistics": str(tmp_path / "statistics")}
    sizes = {"calibration_windows": 8, "calibration_context": 32}
    options = {} if method == "loftq" else text | sizes
    out = exported.pack(model, tmp_path / "out", engine=engine, method=method, **options)
    record = json.loads((out / "loftq.json").read_text())
    assert {layer["method"] for layer in record["layers"]} == {method}
    assert {layer["format"] for layer in record["layers"]} == {ENGINE_FORMATS[engine]}
    done = loftq.export(out, engine=engine, output=tmp_path / "export")
    assert done.target == ENGINES[engine][0]
    assert done.serve[0].engine == engine
    assert str(tmp_path / "export") in done.serve_command


MIXED = {"formats": {"layers.1.mlp.down_proj": "sint8-g32-f16"}}


def test_transformers_is_given_what_reads_several_widths(packed: Packed, tmp_path: Path) -> None:
    out, _ = packed("sint4-g64-f16", **MIXED)
    done = loftq.export(out, engine="transformers", output=tmp_path / "one")
    assert done.target == "compressed-tensors"
    gptq = loftq.export(out, to="gptq", output=tmp_path / "two")
    assert [place.engine for place in gptq.serve] == ["vllm"]
    assert any("transformers builds all its layers alike" in limit for limit in gptq.limits)


@pytest.mark.parametrize(
    "options",
    [
        {"formats": {"layers.1.self_attn.v_proj": "sint8-g32-f16"}},
        {"skip": ["layers.0.mlp.up_proj"]},
    ],
)
def test_vllm_needs_one_format_for_what_it_joins(
    options: dict[str, Any], packed: Packed, tmp_path: Path
) -> None:
    out, _ = packed("sint4-g64-f16", **options)
    with pytest.raises(ExportError, match="compressed-tensors holds it, but vLLM joins"):
        loftq.export(out, engine="vllm", output=tmp_path / "one")
    done = loftq.export(out, to="compressed-tensors", output=tmp_path / "two")
    assert [place.engine for place in done.serve] == ["transformers"]
    assert any(limit.startswith("not for vLLM: vLLM joins") for limit in done.limits)


def test_what_no_engine_reads_is_refused(packed: Packed, tmp_path: Path) -> None:
    both = {"formats": {"layers.1.self_attn.v_proj": "sint8-g32-f16"}}
    out, _ = packed("sint4-g64-f16", **both)
    with pytest.raises(ExportError, match=r"gptq holds it, but vLLM joins .*, and transformers"):
        loftq.export(out, to="gptq", output=tmp_path / "export")
    out, _ = packed("sint4-g64-f16", **MIXED)
    dora = exported.train(out, tmp_path / "dora", use_dora=True)
    done = loftq.export(out, to="gptq", output=tmp_path / "export", adapter=dora)
    assert (done.serve, done.serve_command) == ((), "")
    assert "vLLM refuses DoRA" in done.limits


@pytest.mark.parametrize(
    ("name", "engines"),
    [
        ("nf4-g64-dq", ("transformers", "vllm")),
        ("sint4-g32-f16", ("transformers", "vllm", "llama.cpp")),
        ("iq4nl-g32-f16", ("llama.cpp",)),
        ("nf2-g64-dq", ()),
    ],
)
def test_readers_are_the_engines_that_export_accepts(
    name: str, engines: tuple[str, ...], packed: Packed, tmp_path: Path
) -> None:
    out, _ = packed(name)
    assert readers(out) == engines
    for engine in sorted(set(ENGINES) - set(engines)):
        with pytest.raises(ExportError, match="rounding it again"):
            loftq.export(out, engine=engine, output=tmp_path / engine)


def test_conv1d_and_embeddings_fit_no_other_engine_but_merge(tmp_path: Path) -> None:
    model = zoo.save(zoo.build("gpt2"), tmp_path / "model")
    out = exported.pack(model, tmp_path / "out", format="nf4-g64-dq", rank=2)
    with pytest.raises(ExportError, match="c_attn"):
        loftq.export(out, to="bnb", output=tmp_path / "export")
    done = loftq.export(out, to="dense", output=tmp_path / "dense")
    assert done.compared > 0
    import transformers as hf

    found = hf.AutoModelForCausalLM.from_pretrained(tmp_path / "dense")
    ids = zoo.tokens()
    wanted = exported.logits(loftq.load(out), ids)
    assert (exported.logits(found, ids) - wanted).abs().max() < 1e-4 * wanted.abs().max()


def test_packed_embeddings_are_named(model: Path, tmp_path: Path) -> None:
    out = exported.pack(model, tmp_path / "out", format="nf4-g64-dq", embeddings=True)
    with pytest.raises(ExportError, match=r"model\.embed_tokens \(nf4-g64-dq\): an embedding"):
        loftq.export(out, to="bnb", output=tmp_path / "export")


def test_an_architecture_without_translation(tmp_path: Path) -> None:
    model = zoo.save(zoo.build("phi"), tmp_path / "model")
    out = exported.pack(model, tmp_path / "out", format="sint4-channel-f16")
    with pytest.raises(ExportError, match="PhiForCausalLM: GGUF files are written for Llama"):
        loftq.export(out, engine="llama.cpp", output=tmp_path / "export")


def test_an_adapter_of_another_backbone(packed: Packed, tmp_path: Path) -> None:
    out, _ = packed("nf4-g64-dq")
    _, other = packed("nf2-g64-dq")
    with pytest.raises(LineageError, match="this adapter belongs to backbone"):
        loftq.export(out, to="bnb", output=tmp_path / "export", adapter=other)


def test_missing_adapters_and_other_folders(nf4: tuple[Path, Path], tmp_path: Path) -> None:
    out, trained = nf4
    (trained / "adapter_config.json").unlink()
    with pytest.raises(ValueError, match=r"trained: no readable adapter_config\.json"):
        loftq.export(out, to="bnb", output=tmp_path / "export", adapter=trained)
    exported.change_config(out / exported.START, peft_type="LOHA")
    with pytest.raises(ValueError, match=r"a LOHA adapter\. Only LoRA can be exported"):
        loftq.export(out, to="bnb", output=tmp_path / "export")
    with pytest.raises(ExportError, match=r"no loftq\.json.*no base\.json"):
        loftq.export(trained, to="bnb", output=tmp_path / "export")


def test_damaged_records(nf4: tuple[Path, Path], tmp_path: Path) -> None:
    out, _ = nf4
    record = json.loads((out / "loftq.json").read_text())
    layers = record["layers"]
    (out / "loftq.json").write_text(json.dumps({**record, "layers": [{"name": "x"}]}))
    with pytest.raises(ExportError, match=r"loftq\.json: a layer's record is damaged"):
        loftq.export(out, to="bnb", output=tmp_path / "export")
    (out / "loftq.json").write_text(json.dumps({**record, "version": 2, "layers": layers}))
    with pytest.raises(ExportError, match="written by a newer loftq"):
        loftq.export(out, to="bnb", output=tmp_path / "export")
    (out / "loftq.json").write_text("[]")
    with pytest.raises(ExportError, match=r"loftq\.json: not a JSON object"):
        loftq.export(out, to="bnb", output=tmp_path / "export")


def test_a_run_is_exported_with_its_adapter(nf4: tuple[Path, Path], tmp_path: Path) -> None:
    out, trained = nf4
    run = trained_run.write_run(tmp_path / "run", out)
    shutil.rmtree(run / "adapter")
    shutil.copytree(trained, run / "adapter")
    done = loftq.export(run, to="bnb", output=tmp_path / "export")
    assert "--lora-modules run=" in done.serve_command
    written = load_file(tmp_path / "export" / "adapter" / "adapter_model.safetensors")
    assert all(
        (written[name] == tensor).all()
        for name, tensor in load_file(trained / "adapter_model.safetensors").items()
    )
    config = json.loads((tmp_path / "export" / "adapter" / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == str(tmp_path / "export")
    shutil.rmtree(run / "adapter")
    with pytest.raises((ValueError, RunError), match="adapter"):
        loftq.export(run, to="bnb", output=tmp_path / "again")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ({}, r"give either --to \(bnb, .*\) or --for \(transformers, vllm, llama\.cpp\)"),
        ({"to": "bnb", "engine": "vllm"}, "give either --to"),
        ({"to": "awq"}, "to='awq' does not exist; choose one of bnb, gptq"),
        ({"engine": "ollama"}, "engine='ollama' does not exist; choose one of transformers"),
        ({"to": "bnb", "dtype": "bfloat16"}, "dtype: an option of --to dense, not of --to bnb"),
        ({"to": "dense", "base": "x"}, "base: an option of --to lora, not of --to dense. It takes"),
        ({"to": "bnb", "colour": "x"}, "colour: unknown, not of --to bnb"),
        ({"to": "dense", "dtype": "int8"}, "dtype='int8': choose one of float32"),
    ],
)
def test_wrong_words(words: dict[str, str], message: str, packed: Packed, tmp_path: Path) -> None:
    out, _ = packed("nf4-g64-dq")
    with pytest.raises(ValueError, match=message):
        loftq.export(out, output=tmp_path / "export", **words)
    assert not (tmp_path / "export").exists()


def test_an_engine_too_old_is_a_limit(
    packed: Packed, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, _ = packed("nf4-g64-dq")
    monkeypatch.setattr(engines, "version", {"bitsandbytes": "0.43.3", "vllm": "0.12.0"}.get)
    limits = loftq.export(out, to="bnb", output=tmp_path / "export").limits
    assert (
        "bitsandbytes 0.43.3 is installed here and too old to read this export in transformers: "
        "pip install 'bitsandbytes>=0.46.1'"
    ) in limits
    assert not any(limit.startswith("vllm ") for limit in limits)


def test_a_weight_too_large_for_the_dtype(nf4: tuple[Path, Path], tmp_path: Path) -> None:
    out, trained = nf4
    path = trained / "adapter_model.safetensors"
    tensors = load_file(path)
    tensors[next(iter(sorted(tensors)))] *= 1e9
    save_file(tensors, path, metadata={"format": "pt"})
    with pytest.raises(ExportError, match=r"is not finite in torch\.float16.*dtype=bfloat16"):
        loftq.export(out, to="dense", output=tmp_path / "export", adapter=trained, dtype="float16")


def test_vllm_is_not_offered_what_it_refuses(packed: Packed, tmp_path: Path) -> None:
    out, _ = packed("nf4-g64-dq")
    trained = exported.train(out, tmp_path / "trained", use_dora=True)
    done = loftq.export(out, to="bnb", output=tmp_path / "export", adapter=trained)
    assert [place.engine for place in done.serve] == ["transformers"]
    assert "vLLM refuses DoRA" in done.limits


def test_the_table_is_complete() -> None:
    assert {target for targets in ENGINES.values() for target in targets} == {
        name for name, row in EXPORTS.items() if row.layout is not None
    }
    for engine, targets in ENGINES.items():
        for target in targets:
            layout = EXPORTS[target].layout
            assert layout is not None
            assert engine in layout.readers
    assert {reader.engine for reader in engines.READERS} <= ENGINES.keys()
    assert {t for reader in engines.READERS for t in reader.targets} <= EXPORTS.keys()
