"""The tokenizer inside a GGUF file, from tokenizer.json or from another GGUF of the same model.

llama.cpp splits text into words by rules of its own that a name selects (`tokenizer.ggml.pre`). We
name them where the pre-tokenizer of tokenizer.json is one that we know; for another the tokenizer
is taken from a GGUF file that llama.cpp's converter made.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

from loftq.integrations.export.gguf_names import gguf_module
from loftq.integrations.export.source import ExportError

if TYPE_CHECKING:
    from gguf import GGUFWriter

_CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|"
_REST = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
PRE_TOKENIZERS: dict[tuple[tuple[str, Any], ...], str] = {
    (("Digits", True), ("ByteLevel", True)): "smollm",
    (("ByteLevel", True),): "gpt-2",
    (("Split", _CONTRACTIONS + r"\p{N}{1,3}" + _REST), ("ByteLevel", False)): "llama-bpe",
    (("Split", _CONTRACTIONS + r"\p{N}" + _REST), ("ByteLevel", False)): "qwen2",
}
"""Steps of a pre-tokenizer -> llama.cpp's name of the rules that split alike."""
FOREIGN = ("tokenizer.",)
UNKNOWN_SCORE = -1000.0


def write_vocab(writer: GGUFWriter, folder: Path, size: int, *, vocab: Path | None = None) -> None:
    """Add the tokenizer of `folder`, or that of the GGUF file `vocab`.

    Args:
        writer: whose settings are still open.
        folder: with tokenizer.json and tokenizer_config.json.
        size: rows of the embedding; tokens beyond the tokenizer's are marked unused.
        vocab: a GGUF file of the same model.

    Raises:
        ExportError: no tokenizer.json, or one that we cannot name the rules of.
    """
    if vocab is not None:
        _copy_vocab(writer, vocab, size)
        return
    path = folder / "tokenizer.json"
    if not path.is_file():
        raise ExportError(
            f"{path}: no such file, and llama.cpp reads the tokenizer from the GGUF file. Save it "
            "with AutoTokenizer.from_pretrained(MODEL).save_pretrained(FOLDER), or give a GGUF of "
            "this model with vocab=FILE.gguf."
        )
    tokenizer = json.loads(path.read_bytes())
    model = tokenizer["model"]
    if model.get("type") == "BPE" and model.get("byte_fallback"):
        _write_sentencepiece(writer, tokenizer, folder, size)
    else:
        _write_bytes(writer, tokenizer, path, size)
    gguf = gguf_module()
    bytes_level = not model.get("byte_fallback")
    special = gguf.SpecialVocab(folder, load_merges=bytes_level, n_vocab=size)
    special.add_special_token |= _added(folder)
    special.add_to_gguf(writer, quiet=True)


def _added(folder: Path) -> dict[str, bool]:
    """Which ends of a text get a token: llama.cpp has defaults of its own where nothing is said."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    ids = tokenizer("a").input_ids
    return {"bos": ids[0] == tokenizer.bos_token_id, "eos": ids[-1] == tokenizer.eos_token_id}


def pre_tokenizer(tokenizer: dict[str, Any]) -> str | None:
    """llama.cpp's name for the pre-tokenizer, or None if we do not know one that splits alike."""
    if tokenizer.get("normalizer") not in (None, {"type": "NFC"}):
        return None
    steps = _steps(tokenizer.get("pre_tokenizer") or {})
    return PRE_TOKENIZERS.get(tuple(steps))


def _steps(pre: dict[str, Any]) -> list[tuple[str, Any]]:
    kind = pre.get("type")
    if kind == "Sequence":
        return [step for part in pre["pretokenizers"] for step in _steps(part)]
    if kind == "Split":
        return [("Split", pre["pattern"].get("Regex"))]
    if kind == "Digits":
        return [("Digits", pre.get("individual_digits", False))]
    if kind == "ByteLevel" and not pre.get("add_prefix_space"):
        return [("ByteLevel", pre.get("use_regex", True))]
    return [(str(kind), json.dumps(pre))]


def _write_bytes(writer: GGUFWriter, tokenizer: dict[str, Any], path: Path, size: int) -> None:
    """Byte-level BPE, as GPT-2's."""
    name = pre_tokenizer(tokenizer) if tokenizer["model"].get("type") == "BPE" else None
    if name is None:
        raise ExportError(
            f"{path}: a tokenizer whose rules for splitting words we cannot name to llama.cpp. "
            "Make a GGUF of the original model's vocabulary with llama.cpp's "
            "convert_hf_to_gguf.py --vocab-only and give it with vocab=FILE.gguf."
        )
    tokens, kinds = _tokens(tokenizer, size)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(name)
    writer.add_token_list(tokens)
    writer.add_token_types(kinds)


def _write_sentencepiece(
    writer: GGUFWriter, tokenizer: dict[str, Any], folder: Path, size: int
) -> None:
    """SentencePiece's BPE (Llama 2, Mistral): pieces merge in the order of their scores.

    tokenizer.json holds the merges in that order, so the number of the first merge that makes a
    piece is its score, as in the original model, whose scores count down in the same way.
    """
    gguf = gguf_module()
    tokens, kinds = _tokens(tokenizer, size)
    scores = dict.fromkeys(tokens, UNKNOWN_SCORE * size)
    for rank, merge in reversed(list(enumerate(tokenizer["model"]["merges"]))):
        pair = merge.split(" ") if isinstance(merge, str) else merge
        scores["".join(pair)] = -float(rank)
    for i, token in enumerate(tokens):
        if kinds[i] == gguf.TokenType.NORMAL and re.fullmatch(r"<0x[0-9A-F]{2}>", token):
            kinds[i] = gguf.TokenType.BYTE
        elif token == tokenizer["model"].get("unk_token"):
            kinds[i] = gguf.TokenType.UNKNOWN
    writer.add_tokenizer_model("llama")
    writer.add_tokenizer_pre("default")
    writer.add_token_list(tokens)
    writer.add_token_scores([scores[token] for token in tokens])
    writer.add_token_types(kinds)
    writer.add_add_space_prefix(_prefixes_space(tokenizer))


def _prefixes_space(tokenizer: dict[str, Any]) -> bool:
    text = json.dumps([tokenizer.get("normalizer"), tokenizer.get("pre_tokenizer")])
    return '"Prepend"' in text or '"prepend_scheme": "first"' in text or '"always"' in text


def _tokens(tokenizer: dict[str, Any], size: int) -> tuple[list[str], list[int]]:
    """Text and type of every row of the embedding."""
    kind = gguf_module().TokenType
    by_id = {index: text for text, index in tokenizer["model"]["vocab"].items()}
    added = {token["id"]: token for token in tokenizer.get("added_tokens") or []}
    by_id |= {index: token["content"] for index, token in added.items()}
    beyond = [index for index in by_id if index >= size]
    if beyond:
        raise ExportError(
            f"tokenizer.json: token {by_id[beyond[0]]!r} has number {beyond[0]}, the model's "
            f"embedding has {size} rows. Take the tokenizer that belongs to the model."
        )
    tokens, kinds = [], []
    for index in range(size):
        tokens.append(by_id.get(index, f"[PAD{index}]"))
        if index not in by_id:
            kinds.append(kind.UNUSED)
        elif index not in added:
            kinds.append(kind.NORMAL)
        else:
            kinds.append(kind.CONTROL if added[index]["special"] else kind.USER_DEFINED)
    return tokens, kinds


def _copy_vocab(writer: GGUFWriter, path: Path, size: int) -> None:
    """Every `tokenizer.` key of another file."""
    gguf = gguf_module()
    if not path.is_file():
        raise ExportError(f"{path}: no such file. vocab= takes a GGUF file of the same model.")
    fields = gguf.GGUFReader(path).fields
    count = len(fields["tokenizer.ggml.tokens"].data) if "tokenizer.ggml.tokens" in fields else 0
    if count != size:
        raise ExportError(
            f"{path}: a vocabulary of {count} tokens, the model's embedding has {size} rows. Give "
            "a GGUF file of the same model."
        )
    for name, field in fields.items():
        if name.startswith(FOREIGN):
            sub = field.types[-1] if len(field.types) > 1 else None
            writer.add_key_value(name, field.contents(), field.types[0], sub_type=sub)
