"""The page as text: self-contained, escaped, accessible, complete."""

import json
import re
from html.parser import HTMLParser
from itertools import pairwise
from pathlib import Path

import pytest

pytest.importorskip("jinja2")
pytest.importorskip("matplotlib")

from loftq.report import ReportError, write_report
from loftq.report.html import HOW_TO_GET

VOID = {"meta", "link", "br"}
SVG_URL = re.compile(r'xmlns(?::xlink)?="[^"]*"')


class Outline(HTMLParser):
    """Elements with their attributes; checks that they nest."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.found: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.found if name == tag]


@pytest.fixture(params=["packed", "run"])
def page(request: pytest.FixtureRequest) -> str:
    return write_report(request.getfixturevalue(request.param)).read_text()


def test_the_page_lies_in_the_folder_or_where_it_is_asked_for(packed: Path, tmp_path: Path) -> None:
    assert write_report(packed) == packed / "report.html"
    other = tmp_path / "deep" / "page.html"
    assert write_report(packed, output=other) == other
    assert other.stat().st_size > 10_000
    assert not list(tmp_path.rglob("*.partial"))


def test_nothing_is_fetched_and_nothing_runs(page: str) -> None:
    assert "://" not in SVG_URL.sub("", page)
    assert "default-src 'none'" in page
    outline = Outline(page)
    assert not outline.all("script")
    links = [x.get("href") for tag in ("a", "link", "use") for x in outline.all(tag)]
    assert all(link is None or link.startswith(("#", "data:")) for link in links)
    assert not any(name.startswith("on") for _, found in outline.found for name in found)


def test_elements_nest_and_ids_are_unique(page: str) -> None:
    outline = Outline(page)
    assert outline.open == []
    ids = [found["id"] for _, found in outline.found if "id" in found]
    assert len(ids) == len(set(ids))
    for link in re.findall(r'(?:href="|url\(|labelledby=")#?([^")]+)', page):
        assert link in ids or link.startswith("data:"), link


def test_a_reader_who_does_not_see_gets_names_captions_and_order(page: str) -> None:
    outline = Outline(page)
    assert outline.found[0] == ("html", {"lang": "en"})
    for svg in outline.all("svg"):
        assert svg["role"] == "img"
    assert page.count("<figure ") == page.count("<figcaption>") == page.count("<svg ")
    assert page.count("<table") == page.count("<caption>")
    assert all(x.get("scope") in ("col", "row") for x in outline.all("th"))
    levels = [int(tag[1]) for tag, _ in outline.found if re.fullmatch(r"h\d", tag)]
    assert levels[0] == 1
    assert all(after <= before + 1 for before, after in pairwise(levels))


def test_text_of_the_user_is_text(run: Path) -> None:
    base = json.loads((run / "base.json").read_text())
    (run / "base.json").write_text(json.dumps({**base, "model": "me/<img src=x>&"}))
    text = write_report(run).read_text()
    assert "<script>" not in text
    assert "<img" not in text
    assert "three &lt;script&gt;alert(1)&lt;/script&gt;" in text
    assert "Say &lt;b&gt;one&lt;/b&gt; &amp; two" in text


def test_a_run_shows_all_that_was_recorded(run: Path) -> None:
    text = write_report(run).read_text()
    for words in (
        "2.2000",  # the best validation loss
        "best at step 15",
        "one two\nthree",
        "measured 7.2 MB: the prediction is 2.8% under it",
        'trained tokens</th><td class="text">9,120',
        "learning_rate: 0.0002",
        "All layers in numbers",
        "model.layers.1.mlp.down_proj",
        "loftq export",
    ):
        assert words in text, words
    figures = re.findall(r'<figure id="([\w-]+)"', text)
    assert figures == [
        "loss", "memory", "bytes", "error-before", "error-after",
        "spectrum-1", "spectrum-2", "spectrum-3",
    ]  # fmt: skip


def test_what_is_missing_is_said_on_the_page(packed: Path) -> None:
    record = json.loads((packed / "loftq.json").read_text())
    record["source"]["name"] = "/gone/model"
    (packed / "loftq.json").write_text(json.dumps(record))
    text = write_report(packed).read_text()
    assert "Not shown: the source, /gone/model, is not on this machine." in text
    assert 'id="spectrum-1"' not in text


def test_losses_of_preferences_count_by_the_pair(run: Path) -> None:
    data = json.loads((run / "data.json").read_text())
    (run / "data.json").write_text(json.dumps({**data, "format": "preference"}))
    text = write_report(run).read_text()
    assert "loss (nats per pair)" in text
    assert "mean over the pairs" in text
    assert "nats per token" not in text


def test_a_run_without_losses_or_samples_still_gives_a_page(run: Path) -> None:
    (run / "metrics.jsonl").write_text('{"step": 1, "loss": NaN}\n')
    (run / "samples.json").unlink()
    (run / "memory.json").write_text('{"predicted": {}, "measured_peak": null}')
    text = write_report(run).read_text()
    assert "No validation loss was measured." in text
    assert "The run holds no samples." in text
    assert "The run holds no prediction of its memory." in text


def test_without_the_extra_the_error_says_how_to_get_it(
    packed: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("loftq.report.html.PACKAGES", ("no_such_package",))
    with pytest.raises(ReportError, match="a report needs no_such_package: pip install") as error:
        write_report(packed)
    assert HOW_TO_GET in str(error.value)
    assert not (packed / "report.html").exists()
