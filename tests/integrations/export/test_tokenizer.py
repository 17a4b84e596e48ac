"""An export has the tokenizer that the model was trained with, chat template included."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import transformers as hf

import exported
import loftq

Packed = Callable[..., tuple[Path, Path]]
TEMPLATE = "{% for m in messages %}{{ m.role + ': ' + m.content + '\n' }}{% endfor %}"


@pytest.fixture
def taught(packed: Packed, tmp_path: Path) -> tuple[Path, Path]:
    """An output, and an adapter that was trained with another chat template than the base's."""
    out, _ = packed("sint4-g32-f16")
    trained = exported.train(out, tmp_path / "taught")
    tokenizer = hf.AutoTokenizer.from_pretrained(out)
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(trained)
    return out, trained


@pytest.mark.parametrize("target", ["gptq", "compressed-tensors", "dense", "lora"])
def test_the_chat_template_of_the_training_goes_along(
    target: str, taught: tuple[Path, Path], tmp_path: Path
) -> None:
    out, trained = taught
    assert hf.AutoTokenizer.from_pretrained(out).chat_template == exported.TEMPLATE
    loftq.export(out, to=target, output=tmp_path / "served", adapter=trained)
    served = hf.AutoTokenizer.from_pretrained(tmp_path / "served")
    assert served.chat_template == TEMPLATE
    assert served(exported.TEXT).input_ids == exported.tokenizer()(exported.TEXT).input_ids


def test_the_chat_template_of_the_training_is_in_the_gguf_file(
    taught: tuple[Path, Path], tmp_path: Path
) -> None:
    gguf = pytest.importorskip("gguf", reason="gguf: demo extra")
    out, trained = taught
    loftq.export(out, to="gguf", output=tmp_path / "served", adapter=trained)
    reader = gguf.GGUFReader(tmp_path / "served" / "model.gguf")
    assert reader.fields["tokenizer.chat_template"].contents() == TEMPLATE


def test_an_adapter_without_a_tokenizer_takes_that_of_its_base(
    packed: Packed, tmp_path: Path
) -> None:
    out, trained = packed("sint4-g32-f16")
    assert not (trained / "tokenizer_config.json").exists()
    loftq.export(out, to="dense", output=tmp_path / "served", adapter=trained)
    served = hf.AutoTokenizer.from_pretrained(tmp_path / "served")
    assert served.chat_template == exported.TEMPLATE
