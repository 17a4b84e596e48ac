"""What an encoder is scored by without any training: STS-B, and how far its embeddings moved."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

from torch import nn

from loftq.eval.similarity import embed, similarity_score


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
        original: the model that others came from.
    """

    def __init__(self, path: Path, tokenizer: Any, original: nn.Module) -> None:
        self.tokenizer = tokenizer
        self.pairs, self.labels = read_pairs(path)
        self.sentences = sorted({sentence for pair in self.pairs for sentence in pair})
        self.original = embed(original, tokenizer, self.sentences)

    def __call__(self, model: nn.Module) -> dict[str, float]:
        """`stsb`: Spearman x 100; `moved`: ||E - E0||_F / ||E0||_F x 100 of the embeddings."""
        moved = (embed(model, self.tokenizer, self.sentences) - self.original).norm()
        return {
            "stsb": similarity_score(model, self.tokenizer, self.pairs, self.labels),
            "moved": 100 * float(moved / self.original.norm()),
        }
