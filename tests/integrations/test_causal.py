"""Which model, tokenizer and adapter a path stands for."""

import shutil
from pathlib import Path

import pytest
import torch
from torch import nn

import loftq
import zoo
from loftq.integrations.causal import open_causal
from loftq.integrations.peft import LineageError
from spoken import word_tokenizer
from trained_run import write_run


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("causal")
    zoo.save(zoo.build("llama"), folder / "source")
    word_tokenizer().save_pretrained(folder / "source")
    loftq.quantize(folder / "source", folder / "out", rank=4, bits=2)
    loftq.quantize(folder / "source", folder / "other", rank=4, bits=3)
    loftq.quantize(folder / "source", folder / "plain", rank=4, bits=2, method="qlora")
    write_run(folder / "run", folder / "out")
    _halve(folder / "run/adapter")
    return folder


def _halve(adapter: Path) -> None:
    """Another adapter for the same backbone."""
    from safetensors.torch import load_file, save_file

    file = adapter / "adapter_model.safetensors"
    save_file({k: v / 2 for k, v in load_file(file).items()}, file, metadata={"format": "pt"})


@torch.no_grad()
def logits(model: nn.Module) -> torch.Tensor:
    return model(zoo.tokens()).logits


def test_an_output_comes_with_its_start_and_a_run_with_what_it_learned(work: Path) -> None:
    out, run = open_causal(work / "out"), open_causal(work / "run")
    assert (out.adapter, out.packed) == (work / "out/init_adapter", True)
    assert (run.adapter, run.folder) == (work / "run/adapter", work / "out")
    assert torch.equal(logits(out.model), logits(loftq.load(work / "out")))
    assert torch.equal(
        logits(run.model), logits(loftq.load(work / "out", adapter=work / "run/adapter"))
    )
    assert not torch.equal(logits(run.model), logits(out.model))


def test_a_plain_model_has_no_adapter(work: Path) -> None:
    plain = open_causal(work / "source", device="cpu", dtype="bfloat16")
    assert (plain.adapter, plain.packed, plain.dtype) == (None, False, torch.bfloat16)
    assert plain.context == plain.model.config.max_position_embeddings


def test_the_start_of_a_run_goes_by_its_short_name(work: Path) -> None:
    start = open_causal(work / "run", adapter="init_adapter")
    assert torch.equal(logits(start.model), logits(open_causal(work / "out").model))


def test_an_adapter_may_be_named_by_its_run(work: Path) -> None:
    opened = open_causal(work / "out", adapter=work / "run")
    assert torch.equal(logits(opened.model), logits(open_causal(work / "run").model))


def test_an_adapter_of_another_backbone_is_refused(work: Path) -> None:
    with pytest.raises(LineageError, match="belongs to backbone"):
        open_causal(work / "other", adapter=work / "run")


def test_no_adapter_is_refused_where_the_backbone_needs_one(work: Path) -> None:
    with pytest.raises(ValueError, match="worse than plain rounding without it"):
        open_causal(work / "run", adapter="none")
    with pytest.warns(UserWarning, match="worse than plain"):
        logits(open_causal(work / "out", adapter="none", allow_bare=True).model)
    assert open_causal(work / "plain", adapter="none").adapter is None


def test_a_run_may_bring_the_tokenizer_it_was_trained_with(work: Path, tmp_path: Path) -> None:
    run = Path(shutil.copytree(work / "run", tmp_path / "run"))
    word_tokenizer("{{ messages[0]['content'] }}").save_pretrained(run / "adapter")
    assert open_causal(run).tokenizer.chat_template == "{{ messages[0]['content'] }}"
    assert "im_start" in open_causal(work / "run").tokenizer.chat_template


def test_a_model_without_tokenizer_says_what_to_copy(tmp_path: Path) -> None:
    zoo.save(zoo.build("llama"), tmp_path / "bare")
    with pytest.raises(ValueError, match="Copy the tokenizer files"):
        open_causal(tmp_path / "bare")


def test_an_encoder_does_not_continue_text(tmp_path: Path) -> None:
    zoo.save(zoo.build_base("bert"), tmp_path / "bert")
    word_tokenizer().save_pretrained(tmp_path / "bert")
    with pytest.raises(ValueError, match="not a causal language model"):
        open_causal(tmp_path / "bert")


def test_an_unusable_device_is_refused_first(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="torch cannot use it here"):
        open_causal(tmp_path / "nothing", device="abacus")
