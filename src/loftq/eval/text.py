"""From a text file to the token stream that a perplexity is measured on."""

from __future__ import annotations

import gzip
import json
import re
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

SUFFIXES = (".txt", ".raw", ".jsonl")
"""Kinds of text files, each also as .gz."""
_SPLITS = {"test": "test", "valid": "validation", "validation": "validation", "dev": "validation"}
_SPLITS["train"] = "train"


def read_text(path: str | Path) -> str:
    r"""The text of a file, joined as its kind prescribes. All files are UTF-8, gzip by `.gz`.

    - `.txt`: as it is, line ends included.
    - `.raw`: a WikiText raw file. Each line is a row of the data set, an empty row where the line
      holds only spaces, and the rows are joined by "\n\n": the stream of GPTQ's code
      (`"\n\n".join(dataset["text"])`) and of nearly all tables of perplexities on WikiText-2.
    - `.jsonl`: the string "text" of each line's object, joined by "\n\n".

    Raises:
        ValueError: another suffix, text that is not UTF-8, a line without "text", or no text.
        OSError: no such file, or damaged gzip.
    """
    path = Path(path)
    rows = read_rows(path)
    return rows[0] if _kind(path) == ".txt" else "\n\n".join(rows)


def read_rows(path: str | Path) -> list[str]:
    """The rows of a file as the data set stores them, for protocols that join them in other ways.

    `.raw`: each line with its end, "" for a blank one. `.jsonl`: the text of each line. `.txt`: the
    whole text, one row. Errors as of `read_text`.
    """
    path = Path(path)
    kind = _kind(path)
    raw = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    try:
        text = raw.decode("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: not UTF-8 ({error}). Convert the file to UTF-8.") from error
    rows = [text]
    if kind == ".raw":
        rows = [line + "\n" if line.strip() else "" for line in text.split("\n")[:-1]]
    elif kind == ".jsonl":
        rows = [_field(path, number, line) for number, line in _lines(text)]
    if not "".join(rows).strip():
        raise ValueError(f"{path}: holds no text. Check that it is the file you mean.")
    return rows


def encode(tokenizer: Any, text: str) -> Tensor:
    """Token ids (n,) int64 of the whole text, in one piece, as the tokenizer encodes by default.

    A tokenizer that starts each text with a token (Llama's does) puts one at the very beginning.
    """
    ids = tokenizer(text, verbose=False)["input_ids"]
    return torch.tensor(ids, dtype=torch.int64)


def split_of(path: str | Path) -> str:
    """test, validation or train when the file's name says so, else "unnamed"."""
    words = re.split(r"[^a-z]+", Path(path).name.lower())
    return next((_SPLITS[word] for word in words if word in _SPLITS), "unnamed")


def _kind(path: Path) -> str:
    kind = path.with_suffix("").suffix if path.suffix == ".gz" else path.suffix
    if kind not in SUFFIXES:
        known = ", ".join(SUFFIXES)
        raise ValueError(f"{path}: {kind or 'no'} suffix; expected one of {known}, or with .gz.")
    return kind


def _lines(text: str) -> list[tuple[int, str]]:
    return [(n, line) for n, line in enumerate(text.split("\n"), 1) if line.strip()]


def _field(path: Path, number: int, line: str) -> str:
    try:
        row = json.loads(line)
    except ValueError as error:
        raise ValueError(f"{path}, line {number}: not JSON ({error}).") from error
    text = row.get("text") if isinstance(row, dict) else None
    if not isinstance(text, str):
        raise ValueError(
            f'{path}, line {number}: no string "text". Every line is an object with one.'
        )
    return text
