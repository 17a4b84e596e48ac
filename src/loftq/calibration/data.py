"""From a text file to the token windows that statistics are taken on.

Every window comes with a mask, and only tokens under it are ever counted: statistics over padding
are what made calibration on padded task batches fail (QERA, arXiv:2410.06040, appendix).
"""

from __future__ import annotations

import gzip
import hashlib
import json
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

Encode = Callable[[str], Sequence[int]]
"""A tokenizer: text -> token ids, with the special tokens that it adds by itself."""

SUFFIXES = (".txt", ".raw", ".jsonl")
"""Kinds of files, each also as .gz."""
PARAGRAPHS = "\n\n"


@dataclass(frozen=True, kw_only=True)
class TokenWindows:
    """Token ids to run a model on."""

    ids: Tensor
    """(windows, context) int64."""
    mask: Tensor
    """(windows, context) bool; False = padding, which is in no statistic."""
    source: str
    """Name of the file, for records."""

    @property
    def tokens(self) -> int:
        """Tokens that count."""
        return int(self.mask.sum())

    @property
    def fingerprint(self) -> str:
        """Identity of the tokens, whatever file they came from."""
        digest = hashlib.sha256(f"{tuple(self.ids.shape)}".encode())
        digest.update(self.ids.numpy().tobytes())
        digest.update(self.mask.numpy().tobytes())
        return digest.hexdigest()


def read_documents(path: str | Path) -> list[str]:
    """The documents of a calibration file, in order, UTF-8 and optionally gzip.

    `.jsonl` holds one in the string "text" of each line; `.txt` and `.raw` are one document.

    Raises:
        ValueError: a test split, another suffix, not UTF-8, a line without "text", or no text.
        OSError: no such file, or damaged gzip.
    """
    path = Path(path)
    _refuse_test_split(path)
    kind = path.with_suffix("").suffix if path.suffix == ".gz" else path.suffix
    if kind not in SUFFIXES:
        known = ", ".join(SUFFIXES)
        raise ValueError(f"{path}: {kind or 'no'} suffix; expected one of {known}, or with .gz.")
    raw = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    try:
        text = raw.decode("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: not UTF-8 ({error}). Convert the file to UTF-8.") from error
    documents = [text] if kind != ".jsonl" else _rows(path, text)
    documents = [document for document in documents if document.strip()]
    if not documents:
        raise ValueError(f"{path}: holds no text. Check that it is the file you mean.")
    return documents


def stream_windows(path: str | Path, encode: Encode, *, windows: int, context: int) -> TokenWindows:
    """Full windows of one stream of all documents, for models that read text from left to right.

    Args:
        path: see `read_documents`; documents are joined by an empty line.
        encode: the model's tokenizer.
        windows: most windows to take, from the start.
        context: tokens of a window; a text shorter than one window is one shorter window.

    Raises:
        ValueError: see `read_documents`; a text without a token.
    """
    ids = torch.tensor(list(encode(PARAGRAPHS.join(read_documents(path)))), dtype=torch.int64)
    if not len(ids):
        raise ValueError(f"{path}: the tokenizer finds no token in it. Choose more text.")
    context = min(context, len(ids))
    count = min(windows, len(ids) // context)
    chosen = ids[: count * context].view(count, context)
    return TokenWindows(
        ids=chosen, mask=torch.ones_like(chosen, dtype=torch.bool), source=Path(path).name
    )


def document_windows(
    path: str | Path, encode: Encode, *, windows: int, context: int, pad: int
) -> TokenWindows:
    """One window per document, cut at `context` and padded, for models that read a text as one.

    Args:
        path: see `read_documents`; a plain text counts each paragraph as a document.
        encode: the model's tokenizer, special tokens included.
        windows: most documents to take, from the start.
        context: most tokens of a document.
        pad: id of the padding token.
    """
    documents = read_documents(path)
    if len(documents) == 1:
        documents = [part for part in documents[0].split("\n") if part.strip()]
    rows = [list(encode(document))[:context] for document in documents[:windows]]
    width = max(map(len, rows))
    if not width:
        raise ValueError(f"{path}: the tokenizer finds no token in it. Choose more text.")
    ids = torch.tensor([row + [pad] * (width - len(row)) for row in rows], dtype=torch.int64)
    lengths = torch.tensor([len(row) for row in rows])
    mask = torch.arange(width) < lengths[:, None]
    return TokenWindows(ids=ids, mask=mask, source=Path(path).name)


def _refuse_test_split(path: Path) -> None:
    if "test" in re.split(r"[^a-z]+", path.name.lower()):
        raise ValueError(
            f"{path}: by its name a test split. What a model is calibrated on, it cannot be tested "
            "on any more. Take a training or validation split, or rename the file if it is "
            "neither."
        )


def _rows(path: Path, text: str) -> list[str]:
    lines = [(n, line) for n, line in enumerate(text.split("\n"), 1) if line.strip()]
    return [_field(path, number, line) for number, line in lines]


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
