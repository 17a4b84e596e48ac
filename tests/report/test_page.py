"""The page in a real browser: nothing fails, everything is drawn, a phone is wide enough.

The pictures lie in the folder that LOFTQ_SCREENSHOTS names, if it is set.
"""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

pytest.importorskip("jinja2")
pytest.importorskip("matplotlib")

import chromium
from loftq.report import write_report

PHONE, DESKTOP = 360, 1200
FIGURES = """[...document.querySelectorAll("figure")].map(figure => {
  const svg = figure.querySelector("svg"), box = svg.getBoundingClientRect();
  const marks = [...svg.querySelectorAll("path, use, text")].filter(
    x => !x.closest("defs, clipPath")).map(x => x.getBoundingClientRect());
  return {
    name: figure.id, width: box.width, height: box.height,
    marks: marks.filter(x => x.width * x.height > 0).length,
    beyond: Math.max(...marks.map(x => Math.max(x.right - box.right, box.left - x.left))),
    smallest: Math.min(...[...svg.querySelectorAll("text")].map(
      x => parseFloat(getComputedStyle(x).fontSize) * box.width / svg.viewBox.baseVal.width)),
  };
})"""
# Luminance contrast (WCAG 2) of each text against the nearest opaque background.
CONTRAST = """(() => {
  const canvas = document.createElement("canvas").getContext("2d");
  const channels = color => {
    canvas.fillStyle = color; canvas.fillRect(0, 0, 1, 1);
    return [...canvas.getImageData(0, 0, 1, 1).data].slice(0, 3).map(x => {
      x /= 255; return x <= 0.04045 ? x / 12.92 : ((x + 0.055) / 1.055) ** 2.4;
    });
  };
  const light = ([r, g, b]) => 0.2126 * r + 0.7152 * g + 0.0722 * b;
  const ground = x => {
    const color = getComputedStyle(x).backgroundColor;
    return color !== "rgba(0, 0, 0, 0)" || !x.parentElement ? color : ground(x.parentElement);
  };
  const found = [...document.querySelectorAll("body *")].filter(
    x => [...x.childNodes].some(y => y.nodeType === 3 && y.data.trim())
      && !["title", "STYLE"].includes(x.tagName)
  ).map(x => {
    const style = getComputedStyle(x), ink = x instanceof SVGElement ? style.fill : style.color;
    const [a, b] = [light(channels(ink)), light(channels(ground(x)))];
    return [(Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05), x.tagName];
  });
  return found.sort((a, b) => a[0] - b[0])[0];
})()"""


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[chromium.Chromium]:
    binary = chromium.find()
    if binary is None:
        pytest.skip(f"no browser: none of {', '.join(chromium.NAMES)} is on PATH")
    found = chromium.Chromium(binary, tmp_path_factory.mktemp("chromium"))
    yield found
    found.close()


@pytest.mark.parametrize("width", [PHONE, DESKTOP])
@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
@pytest.mark.parametrize("folder", ["packed", "run"])
def test_a_browser_shows_the_page(
    browser: chromium.Chromium,
    request: pytest.FixtureRequest,
    tmp_path: Path,
    folder: str,
    dark: bool,
    width: int,
) -> None:
    file = write_report(request.getfixturevalue(folder), output=tmp_path / "report.html")
    page = chromium.Page(browser, file, width=width, dark=dark)
    pictures = Path(os.environ.get("LOFTQ_SCREENSHOTS") or tmp_path)
    pictures.mkdir(parents=True, exist_ok=True)
    name = f"{folder}-{width}-{'dark' if dark else 'light'}.png"
    assert page.screenshot(pictures / name).stat().st_size > 10_000
    assert page.complaints == []
    assert page.requests == []
    assert page.evaluate("innerWidth") == width
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    figures = page.evaluate(FIGURES)
    assert len(figures) == (6 if folder == "packed" else 8)
    for figure in figures:
        assert figure["width"] > 250, figure
        assert figure["height"] > 80, figure
        assert figure["marks"] > 10, figure
        assert figure["beyond"] < 12, figure  # slanted labels reach into the margin
        assert figure["smallest"] > 8.5, figure
    contrast, element = page.evaluate(CONTRAST)
    assert contrast >= 4.5, element
    page.close()


def test_an_opened_table_of_all_layers_scrolls_in_itself(
    browser: chromium.Chromium, packed: Path
) -> None:
    page = chromium.Page(browser, write_report(packed), width=PHONE)
    page.evaluate("document.querySelector('details').open = true")
    assert page.evaluate("document.documentElement.scrollWidth") <= PHONE
    inner = "document.querySelector('details .scroll')"
    assert page.evaluate(f"{inner}.scrollWidth > {inner}.clientWidth")
    page.close()


def test_the_browser_would_notice(browser: chromium.Chromium, tmp_path: Path) -> None:
    file = tmp_path / "bad.html"
    file.write_text(
        "<link rel=icon href=data:,><img src=gone.png alt=x><p style='width: 900px'>wide</p>"
        "<script>console.error('no'); nothing()</script>"
    )
    page = chromium.Page(browser, file, width=PHONE)
    assert len(page.complaints) >= 2
    assert [url.rpartition("/")[2] for url in page.requests] == ["gone.png"]
    assert page.evaluate("document.documentElement.scrollWidth") > PHONE
    page.close()
