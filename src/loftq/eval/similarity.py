"""Sentence similarity without training: how much of an encoder's geometry survives quantization."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn


@torch.no_grad()
def embed(model: nn.Module, tokenizer: Any, sentences: Sequence[str], *, batch: int = 64) -> Tensor:
    """Mean-pooled, normalized sentence embeddings (sentences, width) float32 on the CPU.

    Sentences are batched by length; padding does not enter the mean.
    """
    order = sorted(range(len(sentences)), key=lambda i: len(sentences[i]))
    device = next(model.parameters()).device
    rows: list[Tensor] = [torch.empty(0)] * len(sentences)
    for start in range(0, len(order), batch):
        chosen = order[start : start + batch]
        inputs = tokenizer(
            [sentences[i] for i in chosen], padding=True, truncation=True, return_tensors="pt"
        ).to(device)
        hidden = model(**inputs).last_hidden_state.float()
        mask = inputs["attention_mask"][..., None]
        mean = (hidden * mask).sum(1) / mask.sum(1)
        for i, row in zip(chosen, nn.functional.normalize(mean, dim=-1).cpu(), strict=True):
            rows[i] = row
    return torch.stack(rows)


def similarity_score(
    model: nn.Module,
    tokenizer: Any,
    pairs: Sequence[tuple[str, str]],
    labels: Sequence[float],
    *,
    batch: int = 64,
) -> float:
    """Spearman correlation x 100 between cosine similarity and the labels (STS-B's metric)."""
    sentences = sorted({sentence for pair in pairs for sentence in pair})
    vectors = dict(zip(sentences, embed(model, tokenizer, sentences, batch=batch), strict=True))
    return cosine_score(vectors, pairs, labels)


def cosine_score(
    vectors: Mapping[str, Tensor], pairs: Sequence[tuple[str, str]], labels: Sequence[float]
) -> float:
    """The same of sentences that are embedded already, by sentence (see `embed`)."""
    from scipy.stats import spearmanr

    cosines = [float(vectors[a] @ vectors[b]) for a, b in pairs]
    return 100 * float(spearmanr(cosines, labels).statistic)
