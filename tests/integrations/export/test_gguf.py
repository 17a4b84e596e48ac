"""GGUF files as gguf, transformers and llama.cpp read them: names, rope, tokenizer."""

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
from loftq.integrations import engines
from loftq.integrations.export import ExportError
from loftq.integrations.export.gguf_names import llama3_factors
from loftq.integrations.export.gguf_vocab import pre_tokenizer, write_vocab
from tolerances import ENGINE_LOGITS, FLOAT32_ROUNDING, LLAMA_CPP_INPUTS

gguf = pytest.importorskip("gguf", reason="gguf: demo extra")

Packed = Callable[..., tuple[Path, Path]]
LLAMA3 = {
    "rope_type": "llama3", "rope_theta": 500000.0, "factor": 8.0, "low_freq_factor": 1.0,
    "high_freq_factor": 4.0, "original_max_position_embeddings": 32,
}  # fmt: skip
TEXTS = [
    "A river, a sea.", "  two spaces\n\n\nand lines \t tab ", "year 2026 is 12345.678",
    "don't WE'LL they're", "naïve café — “quoted” 日本語 🙂", "<|im_start|>user\nhi<|im_end|>\n",
    "a<|im_end|>b <|endoftext|>", "x = {'a': [1, 2]};//end", "", " ", "\n",
]  # fmt: skip


def made(folder: Path, kind: type = hf.LlamaConfig, **changes: Any) -> tuple[Path, Path]:
    """(output, export) of a tiny model."""
    model = exported.write_model(folder / "model", kind, **changes)
    out = exported.pack(model, folder / "out", format="sint4-g32-f16")
    trained = exported.train(out, folder / "trained")
    loftq.export(out, to="gguf", output=folder / "gguf", adapter=trained)
    return out, folder / "gguf"


def fields(path: Path) -> dict[str, Any]:
    """Settings of a file."""
    return {name: field.contents() for name, field in gguf.GGUFReader(path).fields.items()}


@pytest.mark.parametrize(
    ("kind", "changes"),
    [
        (hf.LlamaConfig, {"tie_word_embeddings": True}),
        (hf.LlamaConfig, {"head_dim": 32, "rope_parameters": {"rope_theta": 500.0}}),
        (hf.MistralConfig, {"sliding_window": None}),
        (hf.Qwen2Config, {}),
        (hf.Qwen3Config, {"head_dim": 128}),  # its loader knows no other; llama.cpp does
    ],
    ids=["tied", "head-dim", "mistral", "qwen2", "qwen3"],
)
def test_transformers_reads_each_architecture(
    kind: type, changes: dict[str, Any], tmp_path: Path
) -> None:
    out, folder = made(tmp_path, kind, **changes)
    base = hf.AutoModelForCausalLM.from_pretrained(
        folder, gguf_file="model.gguf", dtype=torch.float32
    )
    found = exported.logits(PeftModel.from_pretrained(base, tmp_path / "trained"))
    wanted = exported.logits(loftq.load(out, adapter=tmp_path / "trained"))
    assert (found - wanted).abs().max() <= ENGINE_LOGITS * wanted.abs().max()


def test_the_adapter_is_scaled_and_its_rows_follow_the_weights(
    packed: Packed, tmp_path: Path
) -> None:
    out, _ = packed("sint4-g32-f16")
    trained = exported.train(out, tmp_path / "trained", use_rslora=True, lora_alpha=6)
    loftq.export(out, to="gguf", output=tmp_path / "gguf", adapter=trained)
    path = tmp_path / "gguf" / "adapter.gguf"
    about = fields(path)
    assert about["adapter.type"] == "lora"
    # llama.cpp multiplies by alpha / rank: 6 / sqrt(4) = 12 / 4
    assert about["adapter.lora.alpha"] == pytest.approx(12.0)
    tensors = {t.name: torch.from_numpy(t.data.copy()) for t in gguf.GGUFReader(path).tensors}
    assert len(tensors) == 28
    from safetensors.torch import load_file

    ours = load_file(trained / "adapter_model.safetensors")
    stem = "base_model.model.model.layers.0.self_attn.k_proj"
    assert torch.equal(tensors["blk.0.attn_k.weight.lora_a"], ours[f"{stem}.lora_A.weight"])
    B = ours[f"{stem}.lora_B.weight"]  # 2 heads of 16 rows: i and i + 8 become neighbours
    wanted = B.view(2, 2, 8, -1).transpose(1, 2).reshape(B.shape)
    assert torch.equal(tensors["blk.0.attn_k.weight.lora_b"], wanted)
    stem = "base_model.model.model.layers.0.mlp.up_proj"
    assert torch.equal(tensors["blk.0.ffn_up.weight.lora_b"], ours[f"{stem}.lora_B.weight"])


def test_llama3_frequencies_are_those_of_transformers(tmp_path: Path) -> None:
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    config = hf.LlamaConfig(
        hidden_size=64, num_attention_heads=4, max_position_embeddings=128, rope_parameters=LLAMA3
    )
    inverse, _ = ROPE_INIT_FUNCTIONS["llama3"](config, torch.device("cpu"))
    plain = 1 / LLAMA3["rope_theta"] ** (torch.arange(0, 16, 2, dtype=torch.float64) / 16)
    found = plain / llama3_factors(LLAMA3, 16).double()
    assert (found - inverse).abs().max() <= FLOAT32_ROUNDING
    _, folder = made(tmp_path, rope_parameters=LLAMA3)
    (freqs,) = (
        tensor
        for tensor in gguf.GGUFReader(folder / "model.gguf").tensors
        if tensor.name == "rope_freqs.weight"
    )
    assert torch.equal(torch.from_numpy(freqs.data.copy()), llama3_factors(LLAMA3, 16))


def test_settings_and_types_are_told(packed: Packed, tmp_path: Path) -> None:
    out, _ = packed("sint4-g32-f16", formats={"*.down_proj": "sint8-g32-f16"})
    loftq.export(out, to="gguf", output=tmp_path / "gguf")
    about = fields(tmp_path / "gguf" / "model.gguf")
    assert about["general.file_type"] == gguf.LlamaFileType.MOSTLY_Q4_0
    assert about["llama.attention.head_count_kv"] == 2
    assert about["llama.rope.dimension_count"] == 16
    assert about["llama.vocab_size"] == 320
    kinds = {
        tensor.name: tensor.tensor_type.name
        for tensor in gguf.GGUFReader(tmp_path / "gguf" / "model.gguf").tensors
    }
    assert kinds["blk.1.ffn_down.weight"] == "Q8_0"
    assert kinds["blk.1.ffn_up.weight"] == "Q4_0"
    assert kinds["output_norm.weight"] == kinds["output.weight"] == "F32"


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"hidden_act": "gelu"}, "hidden_act='gelu', expected 'silu'"),
        ({"rope_parameters": {"rope_type": "dynamic", "factor": 2.0}}, "rope_type='dynamic'"),
    ],
)
def test_settings_without_translation_are_refused(
    changes: dict[str, Any], why: str, tmp_path: Path
) -> None:
    with pytest.raises(ExportError, match=f"{why}.*--to dense"):
        made(tmp_path, **changes)
    assert not (tmp_path / "gguf").exists()


def test_a_gguf_package_too_old_to_write(
    packed: Packed, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, _ = packed("sint4-g32-f16")
    monkeypatch.setattr(
        "loftq.integrations.export.gguf_names.version", {engines.WRITER: "0.10.0"}.get
    )
    with pytest.raises(ExportError, match=r"gguf 0\.10\.0 is installed.*'gguf>=0\.17'"):
        loftq.export(out, to="gguf", output=tmp_path / "gguf")


class TestVocabulary:
    """The tokenizer in the file against that of transformers."""

    def test_tokens_types_and_special_ids(self, packed: Packed, tmp_path: Path) -> None:
        out, _ = packed("sint4-g32-f16")
        loftq.export(out, to="gguf", output=tmp_path / "gguf")
        about = fields(tmp_path / "gguf" / "model.gguf")
        tokenizer = hf.AutoTokenizer.from_pretrained(out)
        tokens = about["tokenizer.ggml.tokens"]
        count = len(tokenizer)
        assert tokens[:count] == tokenizer.convert_ids_to_tokens(range(count))
        assert len(tokens) == 320
        kinds = about["tokenizer.ggml.token_type"]
        control, unused = int(gguf.TokenType.CONTROL), int(gguf.TokenType.UNUSED)
        special = [i for i, kind in enumerate(kinds) if kind == control]
        assert special == sorted(tokenizer.all_special_ids)
        assert kinds[count:] == [unused] * (320 - count)
        for key in ("bos", "eos", "padding"):
            name = key.replace("padding", "pad")
            wanted = getattr(tokenizer, f"{name}_token_id")
            assert about[f"tokenizer.ggml.{key}_token_id"] == wanted
        assert about["tokenizer.ggml.pre"] == "smollm"
        assert about["tokenizer.ggml.add_bos_token"] is False
        assert about["tokenizer.chat_template"] == exported.TEMPLATE

    def test_bos_is_added_where_transformers_adds_it(self, tmp_path: Path) -> None:
        from tokenizers.processors import TemplateProcessing

        model = exported.write_model(tmp_path / "model")
        tokenizer = exported.tokenizer()
        tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
            single="<|im_start|> $A <|im_end|>",
            special_tokens=[("<|im_start|>", 1), ("<|im_end|>", 2)],
        )
        tokenizer.save_pretrained(model)
        out = exported.pack(model, tmp_path / "out", format="sint4-g32-f16")
        loftq.export(out, to="gguf", output=tmp_path / "gguf")
        about = fields(tmp_path / "gguf" / "model.gguf")
        assert hf.AutoTokenizer.from_pretrained(out)("sea").input_ids[0] == 1
        assert about["tokenizer.ggml.add_bos_token"] is True
        assert about["tokenizer.ggml.add_eos_token"] is True

    def test_sentencepiece_pieces_are_scored_in_the_order_of_their_merges(
        self, tmp_path: Path
    ) -> None:
        tokenizer = exported.sentencepiece()
        about = fields(vocabulary(tokenizer, tmp_path))
        assert about["tokenizer.ggml.model"] == "llama"
        assert about["tokenizer.ggml.add_space_prefix"] is True
        assert about["tokenizer.ggml.add_bos_token"] is True
        kinds, scores = about["tokenizer.ggml.token_type"], about["tokenizer.ggml.scores"]
        assert kinds[0] == int(gguf.TokenType.UNKNOWN)
        assert set(kinds[3:259]) == {int(gguf.TokenType.BYTE)}
        merges = json.loads(tokenizer.backend_tokenizer.to_str())["model"]["merges"]
        ids = tokenizer.convert_tokens_to_ids(["".join(pair) for pair in merges])
        assert len(ids) > 20
        assert [scores[i] for i in ids] == [-float(rank) for rank in range(len(ids))]

    def test_rules_are_named_only_where_they_split_alike(self) -> None:
        known = json.loads(exported.tokenizer().backend_tokenizer.to_str())
        assert pre_tokenizer(known) == "smollm"
        assert pre_tokenizer({**known, "normalizer": {"type": "Lowercase"}}) is None
        plain = known["pre_tokenizer"]["pretokenizers"][1]
        assert pre_tokenizer({**known, "pre_tokenizer": plain}) == "gpt-2"
        prefixed = {**plain, "add_prefix_space": True}
        assert pre_tokenizer({**known, "pre_tokenizer": prefixed}) is None
        digits = {"type": "Digits", "individual_digits": False}
        mixed = {"type": "Sequence", "pretokenizers": [digits, plain]}
        assert pre_tokenizer({**known, "pre_tokenizer": mixed}) is None

    def test_unknown_rules_are_refused_and_another_file_helps(
        self, packed: Packed, tmp_path: Path
    ) -> None:
        import shutil

        source, _ = packed("sint4-g32-f16")
        loftq.export(source, to="gguf", output=tmp_path / "first")
        out = Path(shutil.copytree(source, tmp_path / "out"))
        path = out / "tokenizer.json"
        tokenizer = json.loads(path.read_text())
        path.write_text(json.dumps({**tokenizer, "normalizer": {"type": "Lowercase"}}))
        with pytest.raises(ExportError, match=r"cannot name to llama\.cpp.*vocab=FILE\.gguf"):
            loftq.export(out, to="gguf", output=tmp_path / "gguf")
        loftq.export(
            out, to="gguf", output=tmp_path / "gguf", vocab=tmp_path / "first" / "model.gguf"
        )
        one, two = (fields(tmp_path / name / "model.gguf") for name in ("first", "gguf"))
        keys = [key for key in one if key.startswith("tokenizer.")]
        assert len(keys) > 8
        assert {key: two[key] for key in keys} == {key: one[key] for key in keys}
        with pytest.raises(ExportError, match=r"no such file\. vocab= takes a GGUF"):
            loftq.export(out, to="gguf", output=tmp_path / "none", vocab=tmp_path / "none.gguf")
        path.unlink()
        with pytest.raises(ExportError, match=r"tokenizer\.json: no such file.*vocab=FILE\.gguf"):
            loftq.export(out, to="gguf", output=tmp_path / "none")

    def test_a_tokenizer_larger_than_the_embedding(self, tmp_path: Path) -> None:
        with pytest.raises(ExportError, match=r"embedding has 290 rows"):
            made(tmp_path, vocab_size=290)


def vocabulary(tokenizer: Any, folder: Path, size: int | None = None) -> Path:
    """A GGUF file with nothing but the tokenizer."""
    tokenizer.save_pretrained(folder / "tokenizer")
    (folder / "tokenizer" / "config.json").write_text(json.dumps({"model_type": "llama"}))
    writer = gguf.GGUFWriter(folder / "vocab.gguf", "llama")
    write_vocab(writer, folder / "tokenizer", size or len(tokenizer))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    writer.close()
    return folder / "vocab.gguf"


def llama_cpp(path: Path, **options: Any) -> Any:
    """llama.cpp on a file, or a skipped test."""
    module = pytest.importorskip("llama_cpp", reason="pip install llama-cpp-python (compiles)")
    return module.Llama(str(path), verbose=False, n_ctx=128, n_threads=1, **options)


def check_tokens(engine: Any, tokenizer: Any, texts: list[str]) -> None:
    """The engine splits every text into the ids that transformers gives."""
    for text in texts:
        wanted = tokenizer(text).input_ids
        assert engine.tokenize(text.encode(), add_bos=True, special=True) == wanted, repr(text)


class TestLlamaCpp:
    """What llama.cpp itself makes of the files."""

    @pytest.mark.parametrize(
        ("kind", "changes"),
        [
            (hf.LlamaConfig, {}),
            (hf.LlamaConfig, {"rope_parameters": LLAMA3}),
            (hf.LlamaConfig, {"attention_bias": True, "tie_word_embeddings": True}),
            (hf.MistralConfig, {"head_dim": 32, "sliding_window": None}),
            (hf.Qwen2Config, {}),
            (hf.Qwen3Config, {"head_dim": 32}),
        ],
        ids=["llama", "llama3", "bias-tied", "mistral", "qwen2", "qwen3"],
    )
    def test_logits(self, kind: type, changes: dict[str, Any], tmp_path: Path) -> None:
        pytest.importorskip("llama_cpp", reason="pip install llama-cpp-python (compiles)")
        import numpy

        out, folder = made(tmp_path, kind, **changes)
        wanted = exported.logits(loftq.load(out, adapter=tmp_path / "trained"))[0]
        exported.as_float32(folder / "model.gguf", folder / "float32.gguf")

        def ask(name: str) -> torch.Tensor:
            engine = llama_cpp(
                folder / name, lora_path=str(folder / "adapter.gguf"), logits_all=True,
                type_k=0, type_v=0, flash_attn=False,
            )  # fmt: skip
            engine.eval(exported.prompt()[0].tolist())
            return torch.from_numpy(numpy.array(engine.scores[:24]))

        largest = wanted.abs().max()
        assert (ask("float32.gguf") - wanted).abs().max() <= ENGINE_LOGITS * largest
        # Packed, it rounds activations to 8 bits before each product: some percent of a logit.
        assert (ask("model.gguf") - wanted).norm() <= LLAMA_CPP_INPUTS * wanted.norm()

    def test_tokens(self, tmp_path: Path) -> None:
        pytest.importorskip("llama_cpp", reason="pip install llama-cpp-python (compiles)")
        out, folder = made(tmp_path)
        engine = llama_cpp(folder / "model.gguf", vocab_only=True)
        check_tokens(engine, hf.AutoTokenizer.from_pretrained(out), [*TEXTS, *exported.TEXT])

    def test_tokens_of_sentencepiece(self, tmp_path: Path) -> None:
        pytest.importorskip("llama_cpp", reason="pip install llama-cpp-python (compiles)")
        tokenizer = exported.sentencepiece()
        engine = llama_cpp(vocabulary(tokenizer, tmp_path), vocab_only=True)
        texts = [text for text in TEXTS if text and "<|" not in text]
        check_tokens(engine, tokenizer, [*texts, *exported.TEXT])

    def test_tokens_of_a_real_model(self, models_dir: Path, tmp_path: Path) -> None:
        pytest.importorskip("llama_cpp", reason="pip install llama-cpp-python (compiles)")
        source = models_dir / "smollm2-135m"
        config = json.loads((source / "config.json").read_text())
        tokenizer = hf.AutoTokenizer.from_pretrained(source)
        file = vocabulary(tokenizer, tmp_path, config["vocab_size"])
        engine = llama_cpp(file, vocab_only=True)
        messages = [
            {"role": "user", "content": "What's 12,345 x 7?"},
            {"role": "assistant", "content": "86415\n"},
        ]
        chat = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        code = Path(__file__).read_text()  # long, with every kind of white space
        check_tokens(engine, tokenizer, [*TEXTS, chat, code])
        assert engine.metadata["tokenizer.chat_template"] == tokenizer.chat_template
        assert engine.token_eos() == tokenizer.eos_token_id
