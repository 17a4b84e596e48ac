"""Tiny files of every task, written as LOFTQ_DATA holds them, and tiny models with a tokenizer."""

from __future__ import annotations

import gzip
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from tokenizers.processors import TemplateProcessing

import tiny_tokenizers
import zoo

ROWS = 40
ENDED = ("bart", "t5")
"""Families whose tokenizers end every text with a token."""


def write_rows(path: Path, rows: Iterable[dict[str, Any]]) -> Path:
    """One JSON object a line, compressed if the name says so."""
    path.parent.mkdir(parents=True, exist_ok=True)
    text = "".join(json.dumps(row) + "\n" for row in rows)
    path.write_bytes(gzip.compress(text.encode()) if path.suffix == ".gz" else text.encode())
    return path


def write_data(root: Path) -> Path:
    """All tasks that the tests train on."""
    _write_glue(root / "glue")
    _write_squad(root / "squad")
    _write_gsm8k(root / "gsm8k")
    _write_wikitext(root / "wikitext2")
    _write_scitldr(root / "scitldr")
    return root


def pair(i: int) -> tuple[str, str]:
    """Two sentences; they agree where i is even."""
    same = f"the cat sat on mat {i}"
    return same, same if i % 2 == 0 else f"nothing in particular {i}"


def _write_glue(root: Path) -> None:
    for split, count in (("train", ROWS), ("validation", 12)):
        pairs = [(i, *pair(i)) for i in range(count)]
        rows = [{"sentence1": a, "sentence2": b, "label": i % 2} for i, a, b in pairs]
        write_rows(root / "rte" / f"{split}.jsonl.gz", rows)
        write_rows(root / "mrpc" / f"{split}.jsonl", rows)
        single = [{"sentence": a, "label": i % 2} for i, a, _ in pairs]
        write_rows(root / "cola" / f"{split}.jsonl", single)
        graded = [{**row, "label": float(i % 6)} for i, row in enumerate(rows)]
        write_rows(root / "stsb" / f"{split}.jsonl", graded)
        names = [split] if split == "train" else ["validation_matched", "validation_mismatched"]
        inferred = [{"premise": a, "hypothesis": b, "label": i % 3} for i, a, b in pairs]
        for name in names:
            write_rows(root / "mnli" / f"{name}.jsonl", inferred)


def question(i: int) -> dict[str, Any]:
    """A row of xquad-en: the answer is the middle word of a long context."""
    words = [f"word{j}" for j in range(30)]
    words[15] = f"answer{i}"
    context = " ".join(words)
    answer = {"text": [words[15]], "answer_start": [context.index(words[15])]}
    row = {"id": str(i), "title": f"article {i // 2}", "context": context}
    return {**row, "question": f"which word {i}?", "answers": answer}


def _write_squad(root: Path) -> None:
    write_rows(root / "xquad_en.jsonl.gz", [question(i) for i in range(2 * 48)])


def _write_gsm8k(root: Path) -> None:
    for split, count in (("train", ROWS), ("test", 6)):
        rows = [
            {"question": f"how many cats are {i} and 1?", "answer": f"{i} + 1\n#### 1,{i:03d}"}
            for i in range(count)
        ]
        write_rows(root / f"{split}.jsonl", rows)


def wikitext(articles: int) -> str:
    """Articles in WikiText's raw form, blank lines and all."""
    found = [" \n"]
    for i in range(articles):
        found += [f" = Cat {i} = \n", " \n", " The cat sat on the mat . \n", " = = Rest = = \n"]
        found += [" And thought about nothing in particular . \n", " \n"]
    return "".join(found)


def _write_wikitext(root: Path) -> None:
    root.mkdir(parents=True, exist_ok=True)
    for name, articles in (("valid", 30), ("test", 10)):
        (root / f"wiki.{name}.raw.gz").write_bytes(gzip.compress(wikitext(articles).encode()))


def _write_scitldr(root: Path) -> None:
    for split, count in (("train", ROWS), ("validation", 6), ("test", 5)):
        rows = [
            {"document": f"the cat {i} sat on the mat", "summaries": [f"cat {i}", f"a cat {i}"]}
            for i in range(count)
        ]
        write_rows(root / f"{split}.jsonl.gz", rows)


def write_model(folder: Path, name: str) -> Path:
    """A random model of the zoo with a tokenizer of its own, as a full-precision folder."""
    tokenizer = tiny_tokenizers.tiny()
    tokenizer.model_input_names = ["input_ids", "attention_mask"]
    tokenizer.model_max_length = 256
    if name in ENDED:
        end = [("</s>", tokenizer.eos_token_id)]
        tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
            single="$A </s>", pair="$A </s> $B:1 </s>:1", special_tokens=end
        )
    tokenizer.save_pretrained(folder)
    torch.manual_seed(0)
    config = zoo.ZOO[name].config()
    config.vocab_size, config.eos_token_id = len(tokenizer), tokenizer.eos_token_id
    for dropout in (
        "hidden_dropout_prob",
        "attention_probs_dropout_prob",
        "dropout_rate",
        "dropout",
    ):
        if hasattr(config, dropout):
            setattr(config, dropout, 0.0)
    if hasattr(config, "max_position_embeddings"):
        config.max_position_embeddings = 320
    zoo.ZOO[name].auto.from_config(config).float().save_pretrained(folder)
    return folder
