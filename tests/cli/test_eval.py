"""`loftq eval ppl` on packed and plain models, with everything that decides the number."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

import loftq as library
import zoo
from loftq.eval import encode, perplexity, read_text


def score(loftq: Callable, path: Path, text: Path, *words: object) -> dict:
    answer = loftq("eval", "ppl", path, "--data", text, "--context", 32, "--json", *words)
    assert answer.code == 0, answer.err
    return answer.json


def test_a_plain_model(loftq: Callable, model: Path, text: Path) -> None:
    result = score(loftq, model, text)
    assert result["protocol"] == "gptq"
    assert (result["context"], result["split"], result["data"]) == (32, "test", "wiki.test.raw")
    assert result["tokens"] == result["windows"] * 31
    assert result["adapter"] == "none"
    assert result["dtype"] == "float32"
    assert 1 < result["perplexity"] < 1000


def test_a_packed_model_is_scored_with_its_start_adapter(
    loftq: Callable, out: Path, text: Path
) -> None:
    from transformers import AutoTokenizer

    result = score(loftq, out, text, "--windows", 3, "--device", "cpu", "batch=2")
    assert result["adapter"] == "init_adapter"
    ids = encode(AutoTokenizer.from_pretrained(out), read_text(text))
    ours = perplexity(library.load(out), ids, context=32, windows=3)
    assert result["nll"] == pytest.approx(ours.nll)
    assert result["windows"] == 3


def test_without_its_adapter_it_is_another_model(loftq: Callable, out: Path, text: Path) -> None:
    with pytest.warns(UserWarning, match="worse than plain"):
        bare = score(loftq, out, text, "--adapter", "none", "--windows", 2)
    named = score(loftq, out, text, "--adapter", out / "init_adapter", "--windows", 2)
    start = score(loftq, out, text, "--windows", 2)
    assert named["nll"] == start["nll"] != bare["nll"]


def test_text_names_protocol_context_split_and_windows(
    loftq: Callable, out: Path, text: Path
) -> None:
    answer = loftq("eval", "ppl", out, "--data", text, "--context", 16, "--windows", 2)
    assert answer.out.startswith("perplexity ")
    assert (
        "protocol gptq, context 16, split test (wiki.test.raw), 2 windows, 30 predicted tokens"
        in answer.out
    )
    assert "adapter init_adapter, float32 on cpu" in answer.out


def test_dtype_is_a_key(loftq: Callable, model: Path, text: Path) -> None:
    assert score(loftq, model, text, "dtype=bfloat16", "--windows", 1)["dtype"] == "bfloat16"


def test_an_adapter_of_another_backbone_is_refused(
    loftq: Callable, model: Path, out: Path, text: Path, tmp_path: Path
) -> None:
    other = tmp_path / "other"
    assert loftq("quantize", model, "-o", other, "--rank", 4, "--bits", 3).code == 0
    words = ("--data", text, "--context", 32, "--adapter", other / "init_adapter")
    answer = loftq("eval", "ppl", out, *words)
    assert answer.code == 1
    assert "this adapter belongs to backbone" in answer.err
    plain = loftq("eval", "ppl", model, *words)
    assert plain.code == 1
    assert "has no packed backbone" in plain.err


def test_bad_input_is_one_clear_error(
    loftq: Callable, model: Path, text: Path, tmp_path: Path
) -> None:
    def refused(*words: object) -> str:
        answer = loftq("eval", "ppl", *words)
        assert (answer.code, answer.out) == (1, "")
        return answer.err

    assert "nothere.txt" in refused(model, "--data", tmp_path / "nothere.txt")
    assert "at most 64 tokens" in refused(model, "--data", text)
    assert "windows of 32, expected 10000" in refused(
        model, "--data", text, "--context", 32, "--windows", 10000
    )
    assert "device='cuda:99'" in refused(model, "--data", text, "--device", "cuda:99")
    encoder = zoo.save(zoo.build("bert"), tmp_path / "bert")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(model / name, encoder / name)
    assert "is not a causal language model" in refused(encoder, "--data", text)
    (model / "tokenizer.json").unlink()
    (model / "tokenizer_config.json").unlink()
    assert "its tokenizer cannot be loaded" in refused(model, "--data", text)


def test_a_gpu_without_bfloat16_is_said_with_the_way_out(monkeypatch: pytest.MonkeyPatch) -> None:
    from loftq.integrations.device import check_bfloat16

    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: False)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Tesla T4")
    with pytest.raises(ValueError, match=r"Tesla T4 has no bfloat16.*dtype=float16"):
        check_bfloat16(torch.bfloat16, torch.device("cuda"))
    check_bfloat16(torch.float16, torch.device("cuda"))
    check_bfloat16(torch.bfloat16, torch.device("cpu"))


def test_an_infinite_perplexity_is_null_in_json(
    loftq: Callable, model: Path, text: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import loftq.eval as package

    real = package.protocol_perplexity

    def infinite(*args: object, **kwargs: object) -> object:
        from dataclasses import replace

        return replace(real(*args, **kwargs), perplexity=float("inf"))

    monkeypatch.setattr(package, "protocol_perplexity", infinite)
    answer = loftq("eval", "ppl", model, "--data", text, "--context", 32, "--json")
    assert json.loads(answer.out)["perplexity"] is None
