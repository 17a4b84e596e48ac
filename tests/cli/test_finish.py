"""The page and the upload that end `quantize`, and the page that `inspect` writes."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from loftq.integrations import publish
from loftq.integrations.publish import Pushed
from trained_run import write_run

pytest.importorskip("jinja2")
pytest.importorskip("matplotlib")


@pytest.fixture
def pushed(monkeypatch: pytest.MonkeyPatch) -> list[dict]:
    """What was pushed; nothing leaves this machine."""
    calls: list[dict] = []

    def push(folder: Path, repo: str, **options: object) -> Pushed:
        calls.append({"folder": folder, "repo": repo, **options})
        return Pushed(repo=repo, url=f"hub:{repo}", files=3, bytes=5_000_000, base="org/base")

    monkeypatch.setattr(publish, "push", push)
    monkeypatch.setattr(publish, "check_repo", lambda repo: repo)
    return calls


@pytest.fixture
def no_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("loftq.report.html.PACKAGES", ("no_such_package",))


def test_quantize_ends_with_a_page(loftq: Callable, model: Path, tmp_path: Path) -> None:
    answer = loftq("quantize", model, "-o", tmp_path / "new", "--rank", 4)
    assert f"report  {tmp_path / 'new/report.html'}" in answer.out
    assert (tmp_path / "new/report.html").stat().st_size > 10_000


def test_without_the_extra_one_line_says_how_to_get_the_page(
    loftq: Callable, model: Path, tmp_path: Path, no_extra: None
) -> None:
    answer = loftq("quantize", model, "-o", tmp_path / "new", "--rank", 4)
    assert answer.code == 0
    assert "needs no_such_package: pip install 'loftq[report]'" in answer.out
    assert not (tmp_path / "new/report.html").exists()


def test_a_page_that_was_asked_for_is_refused_before_any_work(
    loftq: Callable, model: Path, tmp_path: Path, no_extra: None
) -> None:
    answer = loftq("quantize", model, "-o", tmp_path / "new", "report=true")
    assert answer.code == 1
    assert "report=true: needs no_such_package" in answer.err
    assert not (tmp_path / "new").exists()


def test_no_page_where_none_is_wanted_and_no_old_one_either(
    loftq: Callable, model: Path, tmp_path: Path
) -> None:
    command = ["quantize", model, "-o", tmp_path / "new", "--rank", 4, "--json"]
    assert loftq(*command).json["report"] == str(tmp_path / "new/report.html")
    answer = loftq(*command, "--overwrite", "--bits", 2, "report=false")
    assert answer.json["report"] is None
    assert not (tmp_path / "new/report.html").exists()


def test_a_page_that_fails_does_not_fail_the_output(
    loftq: Callable, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(facts: object) -> str:
        raise OSError("no space")

    monkeypatch.setattr("loftq.report.html.render", fail)
    answer = loftq("quantize", model, "-o", tmp_path / "new", "--rank", 4)
    assert answer.code == 0
    assert "not written: no space" in answer.out


def test_the_result_is_pushed_as_asked(
    loftq: Callable, model: Path, tmp_path: Path, pushed: list[dict]
) -> None:
    words = [
        "quantize",
        model,
        "-o",
        tmp_path / "new",
        "--rank",
        4,
        "private=true",
        "base=org/base",
    ]
    answer = loftq(*words, "--push-to-hub", "me/new")
    assert "pushed  hub:me/new" in answer.out
    assert "5 MB, base_model org/base" in answer.out
    options = {"private": True, "base": "org/base"}
    assert pushed == [{"folder": tmp_path / "new", "repo": "me/new", **options}]


def test_a_finished_output_is_pushed_without_quantizing_again(
    loftq: Callable, model: Path, tmp_path: Path, pushed: list[dict]
) -> None:
    words = ["quantize", model, "-o", tmp_path / "new", "--rank", 4, "report=false"]
    assert loftq(*words).code == 0
    before = (tmp_path / "new/loftq.json").stat().st_mtime_ns
    answer = loftq(*words, "--push-to-hub", "me/new", "--json")
    assert answer.json["pushed"]["repo"] == "me/new"
    assert "was finished before" in loftq(*words, "--push-to-hub", "me/new").out
    assert len(pushed) == 2
    assert (tmp_path / "new/loftq.json").stat().st_mtime_ns == before
    other = loftq(*words, "--bits", 2, "--push-to-hub", "me/new")
    assert other.code == 1
    assert "holds a finished model" in other.err


def test_a_push_that_cannot_work_is_refused_before_any_work(
    loftq: Callable, model: Path, tmp_path: Path
) -> None:
    answer = loftq("quantize", model, "-o", tmp_path / "new", "--push-to-hub", "a/b/c")
    assert answer.code == 1
    assert "not a hub id" in answer.err
    answer = loftq("quantize", model, "-o", tmp_path / "new", "private=true")
    assert "give --push-to-hub REPO too" in answer.err
    assert not (tmp_path / "new").exists()


def test_inspect_writes_the_page_of_an_output(
    loftq: Callable, out: Path, model: Path, tmp_path: Path
) -> None:
    answer = loftq("inspect", out, "--html", tmp_path / "page.html", "--source", model)
    assert answer.code == 0
    assert f"report: {tmp_path / 'page.html'}" in answer.out
    assert "14" in answer.out
    assert 'id="spectrum-1"' in (tmp_path / "page.html").read_text()
    answer = loftq("inspect", out, "--html", tmp_path / "page.html", "--json")
    assert answer.json["ok"]


def test_inspect_writes_the_page_of_a_run(loftq: Callable, out: Path, tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", out)
    answer = loftq("inspect", run, "--html", tmp_path / "page.html", "--json")
    assert answer.json == {"report": str(tmp_path / "page.html")}
    assert "one two\nthree" in (tmp_path / "page.html").read_text()
    assert json.loads((run / "base.json").read_text())["path"] == str(out)
