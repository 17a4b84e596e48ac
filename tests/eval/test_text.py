"""Reading text files as each kind prescribes."""

import gzip
import hashlib
import json
from pathlib import Path

import pytest
import torch

from loftq.eval import encode, read_text, split_of

WIKI = " \n = Title = \n \n First line . \n Second line . \n \n"


def write(path: Path, text: str) -> Path:
    raw = text.encode()
    path.write_bytes(gzip.compress(raw) if path.suffix == ".gz" else raw)
    return path


@pytest.mark.parametrize("name", ["wiki.raw", "wiki.test.raw.gz"])
def test_raw_is_the_stream_of_the_quantization_papers(tmp_path: Path, name: str) -> None:
    # The rows that the hub's data set holds for these lines, joined as GPTQ's code joins them.
    rows = ["", " = Title = \n", "", " First line . \n", " Second line . \n", ""]
    assert read_text(write(tmp_path / name, WIKI)) == "\n\n".join(rows)


@pytest.mark.parametrize("name", ["a.txt", "a.txt.gz"])
def test_txt_is_taken_as_it_is(tmp_path: Path, name: str) -> None:
    text = " One.\r\n\n\nTwo.\n"
    assert read_text(write(tmp_path / name, text)) == text


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz"])
def test_jsonl_joins_the_field_text(tmp_path: Path, name: str) -> None:
    lines = [json.dumps({"text": text, "id": 1}) for text in ("Eins.", "Zwei\u2028drei.")]
    text = read_text(write(tmp_path / name, "\n\n".join(lines) + "\n"))
    assert text == "Eins.\n\nZwei\u2028drei."


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("a.csv", "x", r"a.csv: .csv suffix; expected one of .txt, .raw, .jsonl"),
        ("a.gz", "x", r"a.gz: no suffix"),
        ("a.txt", " \n", r"a.txt: holds no text"),
        ("a.jsonl", '{"text": "x"}\n{"body": "y"}', r'a.jsonl, line 2: no string "text"'),
        ("a.jsonl", "[1]", r'line 1: no string "text"'),
        ("a.jsonl", '{"text": "x"', r"line 1: not JSON"),
    ],
)
def test_other_files_are_refused(tmp_path: Path, name: str, text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        read_text(write(tmp_path / name, text))


def test_other_encodings_are_refused(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes("Käse".encode("latin-1"))
    with pytest.raises(ValueError, match=r"a\.txt: not UTF-8"):
        read_text(tmp_path / "a.txt")


@pytest.mark.parametrize(
    ("name", "split"),
    [
        ("wiki.test.raw.gz", "test"),
        ("wiki.valid.raw", "validation"),
        ("train-00000.jsonl", "train"),
        ("latest.txt", "unnamed"),
    ],
)
def test_the_split_is_read_from_whole_words_of_the_name(name: str, split: str) -> None:
    assert split_of(name) == split


def test_encode_gives_one_stream_of_integers() -> None:
    def tokenizer(text: str, verbose: bool) -> dict[str, list[int]]:
        return {"input_ids": [len(word) for word in text.split()]}

    ids = encode(tokenizer, "a bb ccc")
    assert ids.tolist() == [1, 2, 3]
    assert ids.dtype == torch.int64


def test_wikitext_2_is_the_well_known_stream(data_dir: Path, models_dir: Path) -> None:
    from transformers import AutoTokenizer

    path = data_dir / "wikitext2/wiki.test.raw.gz"
    digest = hashlib.sha256(gzip.decompress(path.read_bytes())).hexdigest()
    assert digest.startswith("173c87a5")
    tokenizer = AutoTokenizer.from_pretrained(models_dir / "smollm2-135m")
    assert len(encode(tokenizer, read_text(path))) == 304_978  # 148 windows of 2048
