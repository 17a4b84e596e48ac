"""Two MiniLM-shaped encoders as an encoder-decoder: mechanics only, its summaries mean nothing.

The cross attention is new, so that no score says anything; what is shown is that a model of two
backbones is planned, packed, trained and generates.
"""

from pathlib import Path
from typing import Any

import pytest

import loftq
from loftq.lab.compare.recipe import load_recipe
from loftq.lab.compare.standin import tiny
from loftq.lab.compare.standin_rows import words, write_rows
from loftq.nn import packed_layers
from loftq.tasks import evaluate, train_task
from loftq.tasks.scoring import load_task_model

LITTLE = {
    "max_steps": 20, "eval_steps": 10, "batch_size": 4, "gradient_accumulation": 1, "samples": 1,
    "max_length": 48, "answer_tokens": 8, "dtype": "fp32", "learning_rate": 1e-2, "eval_rows": 6,
}  # fmt: skip
LAYERS = 2 * 6 + 2 * 10
"""Two layers of an encoder, and two of a decoder, which attends twice."""


def two_encoders(folder: Path) -> Path:
    """Saved with its tokenizer."""
    from transformers import AutoTokenizer, EncoderDecoderModel

    encoder = str(tiny(load_recipe("glue-minilm").architecture, folder / "encoder", words()))
    model: Any = EncoderDecoderModel.from_encoder_decoder_pretrained(encoder, encoder)
    tokenizer = AutoTokenizer.from_pretrained(encoder)
    special = {"decoder_start_token_id": 1, "pad_token_id": tokenizer.pad_token_id}
    model.config.update(special)
    model.generation_config.update(**special)
    model.save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    return folder / "model"


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning")
def test_two_encoders_are_packed_and_trained_as_one_model(tmp_path: Path) -> None:
    pytest.importorskip("datasets")
    pytest.importorskip("rouge_score")
    out, run = tmp_path / "out", tmp_path / "run"
    loftq.quantize(two_encoders(tmp_path), out, bits=2, rank=4, device="cpu")
    data = write_rows(["scitldr"], tmp_path / "data")
    found = train_task(out, "scitldr", run, data=data, device="cpu", **LITTLE)
    summary = found.summary
    assert summary["best_validation_loss"] < summary["first_validation_loss"] - 0.1
    model, _ = load_task_model(run, "scitldr")
    assert len(packed_layers(model)) == LAYERS
    again = evaluate(run, "scitldr", data=data, device="cpu", limit=6)
    assert again.metrics["test"]["rougeL"]["value"] == found.metrics["test"]["rougeL"]["value"]
