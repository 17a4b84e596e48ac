"""What the user typed, and every input that must be refused before anything is read."""

from __future__ import annotations

import json
from pathlib import Path

import huggingface_hub
import pytest
from huggingface_hub import constants, errors

import zoo
from loftq.checkpoint import CheckpointError
from loftq.integrations import source
from loftq.integrations.source import SourceError, refuse_unusable, resolve_source


@pytest.fixture
def model(tmp_path) -> Path:
    return zoo.save(zoo.build("llama"), tmp_path / "model")


def edit(folder: Path, **changes) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def folder_of(path: Path, *names: str) -> Path:
    path.mkdir()
    for name in names:
        (path / name).write_bytes(b"{}")
    return path


# --- folders


def test_a_full_precision_model_is_accepted(model):
    assert resolve_source(model) == resolve_source(str(model)) == model
    refuse_unusable(model)


@pytest.mark.parametrize(
    ("config", "said"),
    [
        ({"quant_method": "gptq", "bits": 4}, "GPTQ"),
        ({"quant_method": "awq"}, "AWQ"),
        ({"quant_method": "bitsandbytes", "load_in_4bit": True}, "bitsandbytes"),
        ({"load_in_4bit": True}, "bitsandbytes"),
        ({"quant_method": "fp8"}, r"FP8.*FineGrainedFP8Config\(dequantize=True\)"),
        ({"quant_method": "mxfp4"}, r"MXFP4.*Mxfp4Config\(dequantize=True\)"),
        ({"quant_method": "compressed-tensors"}, "compressed-tensors"),
        ({"some": "thing"}, "an unnamed method"),
    ],
)
def test_a_quantized_model_is_refused_with_its_method_and_the_original(model, config, said):
    edit(model, quantization_config=config)
    (model / "README.md").write_text(
        "---\nlicense: mit\nbase_model:\n- org/original-7B\n---\n# M\n"
    )
    with pytest.raises(SourceError, match=rf"(?s)already quantized with {said}") as caught:
        refuse_unusable(model)
    assert "Start from the original model (org/original-7B)" in str(caught.value)


def test_the_remedies_for_native_formats_exist_in_transformers():
    import transformers

    for name in source._DEQUANTIZING.values():
        assert getattr(transformers, name)(dequantize=True).dequantize


def test_a_quantized_part_of_a_model_is_found(model):
    edit(model, text_config={"quantization_config": {"quant_method": "awq"}})
    with pytest.raises(SourceError, match="AWQ"):
        refuse_unusable(model)


def test_an_output_of_ours_is_to_be_loaded(model):
    edit(model, quantization_config={"quant_method": "loftq", "version": 1})
    with pytest.raises(SourceError, match=r"by loftq. Load it with loftq\.load.*its source"):
        refuse_unusable(model)


@pytest.mark.parametrize(
    ("card", "base"),
    [
        ("---\nbase_model: org/name\n---\n", "org/name"),
        ("---\ntags: [a]\nbase_model:\n  - org/first\n  - org/second\n---\n", "org/first"),
        ("---\nlicense: mit\n---\nbase_model: org/prose\n", None),
        ("base_model: org/prose\n", None),
        ("", None),
    ],
)
def test_the_base_model_is_read_from_the_front_matter_of_the_card(tmp_path, card, base):
    (tmp_path / "README.md").write_text(card)
    assert source.card_base(tmp_path) == base


def test_without_a_card_there_is_no_base_model(tmp_path):
    assert source.card_base(tmp_path) is None


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("{", "not valid JSON"),
        ("", "not valid JSON"),
        ("[" * 200_000, "not valid JSON"),
        ("[]", "no model_type"),
        ("{}", "no model_type"),
        ('{"model_type": 3}', "no model_type"),
        ('{"model_type": "no-such-model"}', "'no-such-model' is not in transformers"),
        (" " * (source.MAX_CONFIG_BYTES + 1), "expected at most"),
    ],
    ids=lambda value: value[:12],
)
def test_a_malformed_config_is_refused(model, text, said):
    (model / "config.json").write_text(text)
    with pytest.raises(SourceError, match=said):
        refuse_unusable(model)


def test_code_that_comes_with_a_model_is_never_run(model):
    (model / "modeling_own.py").write_text("raise SystemExit('executed')")
    edit(model, auto_map={"AutoModelForCausalLM": "modeling_own.Own"}, architectures=["Own"])
    with pytest.raises(SourceError, match="never runs code that comes with a model"):
        refuse_unusable(model)
    edit(model, model_type="own", auto_map={"AutoConfig": "modeling_own.Own"})
    with pytest.raises(SourceError, match="brings its own code"):
        refuse_unusable(model)
    edit(model, model_type="llama", architectures=["LlamaForCausalLM"])
    refuse_unusable(model)  # transformers has this one: its own class is used


def test_folders_that_are_no_model(tmp_path):
    with pytest.raises(SourceError, match="no such folder"):
        refuse_unusable(tmp_path / "missing")
    with pytest.raises(SourceError, match=r"no config\.json"):
        refuse_unusable(folder_of(tmp_path / "weights", "model.safetensors"))
    with pytest.raises(SourceError, match="a PEFT adapter, not a model"):
        refuse_unusable(folder_of(tmp_path / "adapter", "adapter_config.json"))


def test_an_adapter_names_its_base(tmp_path):
    folder = folder_of(tmp_path / "adapter")
    text = json.dumps({"base_model_name_or_path": "org/base"})
    (folder / "adapter_config.json").write_text(text)
    with pytest.raises(SourceError, match=r"trained on \(org/base\)"):
        refuse_unusable(folder)


def test_gguf_is_refused_with_the_two_lines_that_convert_it(tmp_path):
    folder = folder_of(tmp_path / "gguf", "m.Q4_K_M.gguf")
    lines = r'(?s)from_pretrained\(".*gguf", gguf_file="m\.Q4_K_M\.gguf"\).*save_pretrained\('
    with pytest.raises(SourceError, match=lines):
        refuse_unusable(folder)
    with pytest.raises(SourceError, match=lines):
        resolve_source(folder / "m.Q4_K_M.gguf")


def test_pickles_are_refused_with_a_safe_conversion(model):
    (model / "model.safetensors").rename(model / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match="weights_only=True"):
        refuse_unusable(model)


@pytest.mark.parametrize("name", ["./missing", "~/no-such-folder", "a/b/c", "a b", "../x/y"])
def test_a_name_that_can_only_be_a_path_is_not_looked_up(name, monkeypatch):
    monkeypatch.setattr(source, "_download", lambda *_: pytest.fail("asked the hub"))
    with pytest.raises(SourceError, match="no such folder"):
        resolve_source(name)


def test_a_file_is_not_a_model(model):
    with pytest.raises(SourceError, match="Give the folder"):
        resolve_source(model / "model.safetensors")


# --- the hub, without one


class Hub:
    """Stands in for huggingface_hub: the files of one repository, or an error for each call."""

    def __init__(self, monkeypatch, files=(), listing=None, download=None):
        self.files, self.listing, self.download, self.asked = list(files), listing, download, None
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(huggingface_hub, "HfApi", lambda: self)
        monkeypatch.setattr(huggingface_hub, "snapshot_download", self.snapshot)

    def list_repo_files(self, name, *, revision=None):
        if self.listing is not None:
            raise self.listing
        return self.files

    def snapshot(self, name, **asked):
        self.asked = asked
        if self.download is not None:
            raise self.download
        return "/cache/snapshot"


def hub_error(kind: type, status: int = 404) -> Exception:
    error = kind.__new__(kind, "said the hub")
    error.response = type("Response", (), {"status_code": status})()
    return error


def test_only_what_is_read_is_downloaded(monkeypatch):
    wanted = [
        *("config.json", "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"),
        *("model.safetensors.index.json", "tokenizer.json", "tokenizer.model", "merges.txt"),
        *("chat_template.jinja", "README.md", "init_adapter/adapter_model.safetensors"),
    ]
    other = [
        *("consolidated.safetensors", "model.fp16.safetensors", "pytorch_model.bin", "a.py"),
        *("model.fp16.safetensors.index.json", "original/params.json", "onnx/model.onnx"),
        *("q.gguf", ".gitattributes", "tf_model.h5"),
    ]
    hub = Hub(monkeypatch, [*wanted, *other])
    assert resolve_source("org/model", revision="v1") == Path("/cache/snapshot")
    assert sorted(hub.asked["allow_patterns"]) == sorted(wanted)
    assert hub.asked["revision"] == "v1"
    assert not hub.asked["local_files_only"]


def test_names_with_glob_signs_are_taken_as_they_are():
    assert source._wanted(["a[1]*.json"]) == ["a[[]1][*].json"]


@pytest.mark.parametrize(
    ("files", "said"),
    [
        (["config.json", "pytorch_model.bin"], r"only pickle weights \(pytorch_model\.bin\)"),
        (["m.gguf"], r'gguf_file="m\.gguf"'),
        (["unet/model.safetensors", "model_index.json"], "no weights at the top level"),
        ([], "no weights at the top level"),
    ],
)
def test_repositories_without_safetensors_are_refused_before_the_download(monkeypatch, files, said):
    hub = Hub(monkeypatch, files)
    with pytest.raises(SourceError, match=said):
        resolve_source("org/model")
    assert hub.asked is None


@pytest.mark.parametrize(
    ("kind", "said"),
    [
        (errors.GatedRepoError, "gated.*hf auth login"),
        (errors.RepositoryNotFoundError, "neither a folder here nor a repository"),
        (errors.RevisionNotFoundError, "no revision 'v1'"),
    ],
)
def test_errors_of_the_hub_become_one_clear_message(monkeypatch, kind, said):
    Hub(monkeypatch, listing=hub_error(kind))
    with pytest.raises(SourceError, match=f"org/model: .*{said}"):
        resolve_source("org/model", revision="v1")


def test_an_id_that_the_hub_client_rejects(monkeypatch):
    Hub(monkeypatch, listing=errors.HFValidationError("no"))
    with pytest.raises(SourceError, match="Check the spelling"):
        resolve_source("org/model--x")


def test_gated_files_of_a_visible_repository(monkeypatch):
    Hub(monkeypatch, ["model.safetensors"], download=hub_error(errors.GatedRepoError, 403))
    with pytest.raises(SourceError, match="gated"):
        resolve_source("org/model")


@pytest.mark.parametrize(
    "listing",
    [
        errors.OfflineModeIsEnabled("offline"),
        hub_error(errors.HfHubHTTPError, 503),
        source.http_error()("connection refused"),
    ],
    ids=["offline", "server error", "no network"],
)
def test_without_the_hub_the_cache_is_used(monkeypatch, listing):
    hub = Hub(monkeypatch, listing=listing)
    assert resolve_source("org/model") == Path("/cache/snapshot")
    assert hub.asked["local_files_only"]
    hub.download = errors.LocalEntryNotFoundError("not cached")
    with pytest.raises(SourceError, match="not in the hub cache"):
        resolve_source("org/model")


def test_hf_hub_offline_asks_nothing(monkeypatch):
    hub = Hub(monkeypatch, listing=AssertionError("asked the hub"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert resolve_source("gpt2") == Path("/cache/snapshot")
    assert hub.asked["local_files_only"]


def test_hf_hub_offline_with_the_real_client(monkeypatch, tmp_path):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(SourceError, match="not in the hub cache"):
        resolve_source("org/never-seen")


@pytest.mark.parametrize("error", [OSError("disk full"), hub_error(errors.HfHubHTTPError, 500)])
def test_a_broken_download_says_to_run_again(monkeypatch, error):
    Hub(monkeypatch, ["model.safetensors"], download=error)
    with pytest.raises(SourceError, match=r"download failed.*Run this again"):
        resolve_source("org/model")
