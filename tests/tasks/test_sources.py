"""Rows of a task: where they come from, what is held out, and what is wrong with them."""

import json
from pathlib import Path

import pytest

import tiny_tasks
from loftq.lab.compare.standin_rows import write_rows
from loftq.tasks import TASKS, TaskError, find_task
from loftq.tasks.sources import read_for_training, read_split, some


def test_names_are_found_and_the_nearest_is_suggested() -> None:
    assert find_task("RTE") is TASKS["rte"]
    with pytest.raises(TaskError, match=r"no task 'sst'. Did you mean sst2\? There are rte, mrpc"):
        find_task("sst")


def test_a_split_is_read_in_order_whatever_its_suffix(data: Path) -> None:
    rows = read_split(TASKS["rte"], "validation", data=data)
    assert [row.values["label"] for row in rows] == [i % 2 for i in range(12)]
    assert rows[2].place == f"{data}/glue/rte/validation.jsonl.gz, line 3"
    assert len(read_split(TASKS["mrpc"], "train", data=data)) == tiny_tasks.ROWS


def test_the_environment_names_the_folder(data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LOFTQ_DATA", str(data))
    assert len(read_split(TASKS["rte"], "train")) == tiny_tasks.ROWS
    monkeypatch.setenv("LOFTQ_DATA", str(data / "nowhere"))
    with pytest.raises(TaskError, match=r"LOFTQ_DATA=.*nowhere: no such folder"):
        read_split(TASKS["rte"], "train")


def test_without_a_folder_the_hub_is_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    from loftq.train.data import sources

    def load(name: str, repository: str, configuration: str | None) -> dict:
        assert (name, repository, configuration) == ("nyu-mll/glue:rte", "nyu-mll/glue", "rte")
        return {"train": [{"sentence1": "a", "sentence2": "b", "label": 1, "idx": 0}]}

    monkeypatch.delenv("LOFTQ_DATA", raising=False)
    monkeypatch.setattr(sources, "load_splits", load)
    (row,) = read_split(TASKS["rte"], "train")
    assert row.values["sentence2"] == "b"
    assert row.place == "nyu-mll/glue:rte (train), row 1"
    with pytest.raises(TaskError, match="rte: no split 'validation' in nyu-mll/glue:rte; found tr"):
        read_split(TASKS["rte"], "validation")


def test_a_task_of_files_only_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("LOFTQ_DATA", raising=False)
    with pytest.raises(TaskError, match="scitldr: its data is read from local files only"):
        read_split(TASKS["scitldr"], "train")
    with pytest.raises(TaskError, match=r"dream/train is not there .* local files only"):
        read_split(TASKS["dream"], "train", data=tmp_path)


def test_what_is_held_out_is_no_part_of_train_nor_of_what_is_reported(data: Path) -> None:
    task = TASKS["rte"]
    found = read_for_training(task, data=data, holdout=0.2)
    places = {row.place for row in found.train}
    held = {row.place for row in found.validation}
    assert (len(places), len(held)) == (32, 8)
    assert not places & held
    reported = {row.place for row in read_split(task, "validation", data=data)}
    assert not reported & (places | held)
    again = read_for_training(task, data=data, holdout=0.2)
    assert [row.place for row in again.validation] == [row.place for row in found.validation]


@pytest.mark.parametrize("name", ["rte", "dream"])
def test_a_checkpoint_may_be_chosen_by_some_of_the_rows(name: str, tmp_path: Path) -> None:
    """Held out of train (rte) or a published split (dream): train keeps its rows."""
    data = write_rows([name], tmp_path)
    whole = read_for_training(TASKS[name], data=data, holdout=0.2)
    some_rows = read_for_training(TASKS[name], data=data, holdout=0.2, validation_rows=3)
    assert some_rows.train == whole.train
    assert len(some_rows.validation) == 3 < len(whole.validation)
    assert all(row in whole.validation for row in some_rows.validation)
    assert any("chosen on 3 rows" in note for note in some_rows.notes)


def test_questions_of_one_article_stay_together(data: Path) -> None:
    task = TASKS["xquad-en"]
    found = read_for_training(task, data=data, holdout=0.1)
    titles = [{row.values["title"] for row in part} for part in (found.train, found.validation)]
    test = {row.values["title"] for row in read_split(task, "test", data=data)}
    assert not titles[0] & titles[1]
    assert not test & (titles[0] | titles[1])
    assert test == {f"article {i}" for i in range(36, 48)}
    assert len(titles[0] | titles[1]) == 36


def test_wikitext_is_read_as_articles(data: Path) -> None:
    rows = read_split(TASKS["wikitext2"], "test", data=data)
    assert len(rows) == 10
    assert rows[0].values["lines"][:2] == ["", " = Cat 0 = \n"]
    lines = [line for row in rows for line in row.values["lines"]]
    stored = tiny_tasks.wikitext(10).split("\n")[:-1]
    assert lines == [f"{line}\n" if line.strip() else "" for line in stored]
    with pytest.raises(TaskError, match=r"no split 'train' in .*; found wiki.test, wiki.valid"):
        read_split(TASKS["wikitext2"], "train", data=data)


def test_some_rows_are_the_same_for_all_and_in_order(data: Path) -> None:
    rows = read_split(TASKS["rte"], "train", data=data)
    few, more = some(rows, 5), some(rows, 10)
    assert [row.place for row in few] == [row.place for row in some(rows, 5)]
    assert {row.place for row in few} < {row.place for row in more}
    assert few == sorted(few, key=rows.index)
    assert some(rows, None) == rows


ROW = {"sentence1": "a", "sentence2": "b", "label": 0}


@pytest.mark.parametrize(
    ("task", "row", "message"),
    [
        (
            "rte",
            {"sentence1": "a", "label": 0},
            "line 2: no column 'sentence2'; found sentence1, l",
        ),
        ("rte", ROW | {"label": 2}, r"line 2: label is 2; expected 0 to 1 \(entailment, not_en"),
        ("rte", ROW | {"label": -1}, "-1 is the mark of a split whose labels are not public"),
        ("rte", ROW | {"label": 0.5}, "label is 0.5; expected 0 to 1"),
        ("rte", ROW | {"sentence1": 3}, "sentence1 is 3; expected text"),
        ("stsb", ROW | {"label": 5.5}, "label is 5.5; expected a number from 0 to 5"),
        ("stsb", ROW | {"label": "5"}, "label is '5'; expected a number"),
    ],
)
def test_a_bad_row_is_named(tmp_path: Path, task: str, row: dict, message: str) -> None:
    tiny_tasks.write_rows(tmp_path / f"glue/{task}/train.jsonl", [ROW, row, ROW])
    with pytest.raises(TaskError, match=message):
        read_split(TASKS[task], "train", data=tmp_path)


def test_bad_rows_may_be_left_out_of_training_and_never_of_what_is_reported(
    tmp_path: Path,
) -> None:
    task = TASKS["rte"]
    rows = [ROW, ROW | {"label": 9}, *[ROW | {"label": i % 2} for i in range(8)]]
    tiny_tasks.write_rows(tmp_path / "glue/rte/train.jsonl", rows)
    found = read_for_training(task, data=tmp_path, holdout=0.2, on_bad_rows="skip")
    assert (len(found.train) + len(found.validation), found.skipped) == (9, 1)
    assert "1 row cannot be used, left out of training, such as" in found.notes[1]
    with pytest.raises(TaskError, match=r"1 row cannot be used[\s\S]*on_bad_rows=skip"):
        read_for_training(task, data=tmp_path, holdout=0.2)
    with pytest.raises(TaskError, match="label is 9"):
        read_split(task, "train", data=tmp_path)
    tiny_tasks.write_rows(tmp_path / "glue/rte/validation.jsonl", rows)
    with pytest.raises(TaskError, match=r"that is reported is never thinned\.$"):
        read_split(task, "validation", data=tmp_path)


QUESTION = tiny_tasks.question(0)


@pytest.mark.parametrize(
    ("answers", "message"),
    [
        ({"text": ["elsewhere"], "answer_start": [0]}, "no answer span: the context does not read"),
        ({"text": [], "answer_start": []}, "answers is empty; expected an answer span"),
        ({"text": ["word0"], "answer_start": []}, "two lists of equal length"),
        ("word0", "two lists of equal length"),
    ],
)
def test_a_question_without_its_answer_is_named(
    tmp_path: Path, answers: object, message: str
) -> None:
    tiny_tasks.write_rows(tmp_path / "squad/train.jsonl", [QUESTION | {"answers": answers}])
    with pytest.raises(TaskError, match=message):
        read_split(TASKS["squad"], "train", data=tmp_path)


def test_reasoning_without_a_result_and_summaries_without_words_are_named(tmp_path: Path) -> None:
    tiny_tasks.write_rows(tmp_path / "gsm8k/train.jsonl", [{"question": "q", "answer": "5"}])
    with pytest.raises(TaskError, match="answer holds no line `#### NUMBER`"):
        read_split(TASKS["gsm8k"], "train", data=tmp_path)
    tiny_tasks.write_rows(tmp_path / "scitldr/train.jsonl", [{"document": "d", "summaries": []}])
    with pytest.raises(TaskError, match=r"summaries is \[\]; expected a summary, or several"):
        read_split(TASKS["scitldr"], "train", data=tmp_path)


def test_a_missing_folder_and_a_cut_file_are_told_apart(data: Path, tmp_path: Path) -> None:
    with pytest.raises(
        TaskError, match=r"sst2: .*glue/sst2/train is not there .* unset LOFTQ_DATA"
    ):
        read_split(TASKS["sst2"], "train", data=data)
    tiny_tasks.write_rows(tmp_path / "squad/xquad_en.jsonl", [QUESTION])
    with pytest.raises(TaskError, match="1 values of 'title'; the first 36 are for training"):
        read_split(TASKS["xquad-en"], "test", data=tmp_path)
    path = tiny_tasks.write_rows(tmp_path / "glue/rte/train.jsonl", [ROW])
    path.write_text(json.dumps(ROW) + "\n" + '{"sentence1": ')
    with pytest.raises(TaskError, match="line 2: not JSON"):
        read_split(TASKS["rte"], "train", data=tmp_path)


def test_real_files_have_the_published_rows(data_dir: Path) -> None:
    for name, split, count in (
        ("rte", "validation", 277), ("cola", "validation", 1043), ("mrpc", "test", 1725),
        ("stsb", "train", 5749), ("gsm8k", "test", 1319), ("scitldr", "validation", 619),
        ("wikitext2", "test", 62), ("wikitext2-small", "validation", 60),
    ):  # fmt: skip
        assert len(read_split(TASKS[name], split, data=data_dir)) == count, name
    test = read_split(TASKS["xquad-en"], "test", data=data_dir)
    train = read_split(TASKS["xquad-en"], "train", data=data_dir)
    assert len(test) + len(train) == 1190
