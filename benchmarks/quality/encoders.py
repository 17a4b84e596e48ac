"""What an encoder is scored by without any training: STS-B, and how far its embeddings moved."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

from loftq.eval.similarity import cosine_score, embed


def read_pairs(path: Path) -> tuple[list[tuple[str, str]], list[float]]:
    """Sentence pairs and labels of a GLUE STS-B file (jsonl, gzip or not)."""
    raw = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    rows = [json.loads(line) for line in raw.decode().splitlines()]
    return [(r["sentence1"], r["sentence2"]) for r in rows], [r["label"] for r in rows]


class Pairs:
    """Scores models against the original one on a file of pairs.

    Args:
        path: GLUE STS-B, jsonl.
        tokenizer: of the model.
        original: the model that others came from, with a head or without.
    """

    def __init__(self, path: Path, tokenizer: Any, original: Any) -> None:
        self.tokenizer = tokenizer
        self.pairs, self.labels = read_pairs(path)
        self.sentences = sorted({sentence for pair in self.pairs for sentence in pair})
        self.original = embed(original.base_model, tokenizer, self.sentences)

    def __call__(self, model: Any) -> dict[str, float]:
        """`stsb`: Spearman x 100; `moved`: ||E - E0||_F / ||E0||_F x 100 of the embeddings."""
        now = embed(model.base_model, self.tokenizer, self.sentences)
        vectors = dict(zip(self.sentences, now, strict=True))
        return {
            "stsb": cosine_score(vectors, self.pairs, self.labels),
            "moved": 100 * float((now - self.original).norm() / self.original.norm()),
        }
