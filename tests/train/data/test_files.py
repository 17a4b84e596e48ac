"""Files give rows, and say where they cannot."""

from __future__ import annotations

import gzip
import json
import re
from pathlib import Path
from typing import Any

import pytest

from loftq.train.data.files import BLOCK_CHARACTERS, Row, read_file
from loftq.train.data.problems import BadRow, DataError
from loftq.train.data.samples import CONTINUES
from loftq.train.data.sources import open_source, split_of

ROWS = [{"text": "Käse\u2028日本"}, {"text": "two", "n": None}]
LINES = "\n".join(json.dumps(row, ensure_ascii=False) for row in ROWS) + "\n\n"


def parquet(path: Path) -> None:
    pa = pytest.importorskip("pyarrow")
    from pyarrow.parquet import write_table

    write_table(pa.Table.from_pylist(ROWS), path)


def write(path: Path, text: str | bytes) -> Path:
    raw = text.encode() if isinstance(text, str) else text
    path.write_bytes(gzip.compress(raw) if path.suffix == ".gz" else raw)
    return path


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("a.jsonl", LINES),
        ("a.JSONL", "\ufeff" + LINES),
        ("a.jsonl.gz", LINES),
        ("a.json", json.dumps(ROWS)),
        ("a.json.gz", json.dumps(ROWS, indent=1)),
        ("a.json", LINES),
        ("a.jsonl", LINES.replace("\n", "\r\n")),
    ],
)
def test_every_kind_of_file_gives_the_same_rows(tmp_path: Path, name: str, text: str) -> None:
    values = [row.values for row in read_file(write(tmp_path / name, text)) if isinstance(row, Row)]
    assert values == [{"text": "Käse\u2028日本"}, {"text": "two"}]


def test_parquet_gives_the_same_rows(tmp_path: Path) -> None:
    parquet(tmp_path / "a.parquet")
    rows = [row for row in read_file(tmp_path / "a.parquet") if isinstance(row, Row)]
    assert [row.values for row in rows] == [{"text": "Käse\u2028日本"}, {"text": "two"}]
    assert str(rows[1].place).endswith("a.parquet, row 2")


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        (b'{"text": "x"', "line 2: not JSON"),
        (b'{"text": "K\xe4se"}', r"line 2: not UTF-8 \(byte 0xe4 at 11\). Convert"),
        (b"[1]", "line 2: is a list; expected an object"),
        (b"[" * 100_000, "line 2: not JSON"),
        (b"null", "line 2: is null; expected an object"),
    ],
)
def test_a_bad_line_does_not_hide_the_others(tmp_path: Path, line: bytes, reason: str) -> None:
    path = write(tmp_path / "a.jsonl", b'{"text": "x"}\n' + line + b'\n{"text": "y"}')
    first, bad, last = read_file(path)
    assert isinstance(first, Row)
    assert isinstance(last, Row)
    assert isinstance(bad, BadRow)
    assert re.search(reason, str(bad)), str(bad)


@pytest.mark.parametrize(
    ("name", "raw", "message"),
    [
        ("a.csv", b"a,b", r"a\.csv: \.csv suffix; expected one of \.jsonl, \.json"),
        ("a.json", b"[1, 2", r"a\.json: not JSON"),
        ("a.json", b'{\n "data": []\n}', r"a\.json: is one object; expected a list of objects"),
        ("a.txt", "one\nKäse".encode("latin-1"), r"a\.txt, line 2: not UTF-8 \(byte 0xe4\)"),
        ("a.parquet", b"PAR1", r"a\.parquet: not a readable parquet file"),
        ("b.jsonl.gz", b"no gzip", r"b\.jsonl\.gz: cannot be read"),
    ],
)
def test_unreadable_files_are_refused(tmp_path: Path, name: str, raw: bytes, message: str) -> None:
    (tmp_path / name).write_bytes(raw)
    with pytest.raises(DataError, match=message):
        list(open_source(str(tmp_path / name)).train())


def test_a_text_file_is_one_document_in_blocks_of_whole_paragraphs(tmp_path: Path) -> None:
    paragraph = "A river carries water and mud to the sea.\n" * 20 + "\n"
    text = paragraph * (3 * BLOCK_CHARACTERS // len(paragraph))
    rows = list(read_file(write(tmp_path / "a.txt", text)))
    blocks = [row.values for row in rows if isinstance(row, Row)]
    assert len(blocks) > 1
    assert "".join(block["text"] for block in blocks) == text.strip("\n")
    assert all(block["text"].endswith("sea.\n\n") for block in blocks[:-1])
    assert [block[CONTINUES] for block in blocks] == [True] * (len(blocks) - 1) + [False]
    assert max(len(block["text"]) for block in blocks) <= BLOCK_CHARACTERS


def test_a_text_without_any_space_is_cut_where_it_must_be(tmp_path: Path) -> None:
    text = "x" * (2 * BLOCK_CHARACTERS + 5)
    rows = list(read_file(write(tmp_path / "a.txt", text)))
    assert "".join(row.values["text"] for row in rows if isinstance(row, Row)) == text


def test_a_folder_keeps_validation_and_test_files_apart(tmp_path: Path) -> None:
    for name in ("train-0.jsonl", "train-1.jsonl", "test.jsonl", "dev.jsonl.gz"):
        write(tmp_path / name, json.dumps({"text": name}))
    (tmp_path / "README.md").write_text("about")
    source = open_source(str(tmp_path))
    rows = [row.values["text"] for row in source.train() if isinstance(row, Row)]
    assert rows == ["train-0.jsonl", "train-1.jsonl"]
    held = [row.values["text"] for row in source.for_validation() if isinstance(row, Row)]
    assert held == ["dev.jsonl.gz"]
    assert any("left out as test data: test.jsonl" in note for note in source.notes)


@pytest.mark.parametrize(
    ("files", "message"),
    [([], "holds no data files"), (["test.jsonl"], "none of them is training data by its name")],
)
def test_a_folder_without_training_data_is_refused(
    tmp_path: Path, files: list[str], message: str
) -> None:
    for name in files:
        write(tmp_path / name, LINES)
    with pytest.raises(DataError, match=message):
        open_source(str(tmp_path))


@pytest.mark.parametrize("name", ["nowhere.jsonl", "a/b/c", "./chats"])
def test_a_path_that_leads_nowhere_is_refused(name: str) -> None:
    with pytest.raises(DataError, match=r"no such file or folder\. Check the path"):
        open_source(name)


def test_a_hub_id_that_cannot_be_had_says_so_once() -> None:
    with pytest.raises(DataError, match=r"some-org/some-data: no such file or folder here, and no"):
        open_source("some-org/some-data")


def test_the_splits_of_the_hub_are_kept_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    datasets = pytest.importorskip("datasets")
    asked: list[tuple[str, str | None]] = []

    def load(repository: str, configuration: str | None) -> Any:
        asked.append((repository, configuration))
        names = ("train", "validation", "test")
        return datasets.DatasetDict(
            {name: datasets.Dataset.from_list([{"text": name, "n": None}]) for name in names}
        )

    monkeypatch.setattr(datasets, "load_dataset", load)
    source = open_source("some-org/some-data:main")
    assert asked == [("some-org/some-data", "main")]
    (row,) = source.train()
    assert isinstance(row, Row)
    assert row.values == {"text": "train"}
    assert str(row.place) == "some-org/some-data:main (train), row 1"
    (held,) = source.for_validation()
    assert isinstance(held, Row)
    assert held.values == {"text": "validation"}
    assert source.notes == ("left out of some-org/some-data:main: split test",)


@pytest.mark.parametrize(
    ("name", "split"),
    [
        ("chats.jsonl", "train"),
        ("latest.jsonl", "train"),
        ("my-test.jsonl", "test"),
        ("dev.json", "validation"),
        ("train_sft", "train"),
    ],
)
def test_a_split_is_a_whole_word_of_the_name(name: str, split: str) -> None:
    assert split_of(name) == split
