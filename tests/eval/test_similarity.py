"""Sentence similarity: what enters an embedding, the metric, and the published numbers."""

import gzip
import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn

import loftq
from loftq.eval.similarity import embed, similarity_score
from tolerances import FLOAT32_SOLVE, SPEARMAN_POINTS


class Letters(nn.Module):
    """An encoder whose hidden states are one-hot letters; padding gets a state that would show."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.eye(27))

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> SimpleNamespace:
        hidden = self.table[input_ids] + 100 * (1 - attention_mask[..., None])
        return SimpleNamespace(last_hidden_state=hidden)


class LetterTokens(dict):
    """Token k is the k-th letter; 26 pads."""

    def to(self, device: torch.device) -> "LetterTokens":
        return self


def tokenizer(sentences: list[str], **_: object) -> LetterTokens:
    width = max(map(len, sentences))
    ids = [[ord(c) - 97 for c in s] + [26] * (width - len(s)) for s in sentences]
    mask = [[1] * len(s) + [0] * (width - len(s)) for s in sentences]
    return LetterTokens(input_ids=torch.tensor(ids), attention_mask=torch.tensor(mask))


def test_embeddings_are_unit_means_of_the_tokens_and_keep_the_order_of_the_sentences() -> None:
    sentences = ["abcd", "a", "ab"]
    found = embed(Letters(), tokenizer, sentences, batch=2)
    for row, sentence in zip(found, sentences, strict=True):
        wanted = torch.zeros(27)
        wanted[: len(sentence)] = len(sentence) ** -0.5
        assert torch.allclose(row, wanted, atol=FLOAT32_SOLVE)


def test_the_score_is_the_rank_correlation_of_the_cosines() -> None:
    pairs = [("a", "b"), ("a", "abcd"), ("a", "ab"), ("a", "a")]  # cosines 0, 1/2, 0.71, 1
    assert similarity_score(Letters(), tokenizer, pairs, [0, 1, 2, 5]) == pytest.approx(100)
    assert similarity_score(Letters(), tokenizer, pairs, [5, 2, 1, 0]) == pytest.approx(-100)
    # One swap of neighbours among four: 1 - 6 * 2 / (4 * 15).
    assert similarity_score(Letters(), tokenizer, pairs, [1, 0, 2, 5]) == pytest.approx(80)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "reference", "rounded"), [("mpnet-base", 83.42, 43.7), ("minilm-l6", 82.03, 67.0)]
)
def test_stsb_of_untrained_encoders_is_reproduced(
    models_dir: Path, data_dir: Path, name: str, reference: float, rounded: float
) -> None:
    """STS-B test: the published correlation, and that of NF2 rounding with float32 scales."""
    from transformers import AutoModel, AutoTokenizer

    lines = gzip.decompress((data_dir / "glue/stsb/test.jsonl.gz").read_bytes()).splitlines()
    rows = [json.loads(line) for line in lines]
    pairs, labels = [(r["sentence1"], r["sentence2"]) for r in rows], [r["label"] for r in rows]
    words = AutoTokenizer.from_pretrained(models_dir / name)
    model = AutoModel.from_pretrained(models_dir / name, dtype="float32").eval()
    score = similarity_score(model, words, pairs, labels)
    assert score == pytest.approx(reference, abs=SPEARMAN_POINTS)
    packed = loftq.quantize_model(
        model, format="nf2-g64-f32", scale_fit="absmax", method="qlora", rank=16
    )
    score = similarity_score(packed.eval(), words, pairs, labels)
    assert score == pytest.approx(rounded, abs=SPEARMAN_POINTS)
