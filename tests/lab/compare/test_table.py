"""From rows to a table and a picture."""

import math
from pathlib import Path
from typing import Any

import pytest

from loftq.lab.compare.recipe import read_recipe
from loftq.lab.compare.statistics import differences, summarise
from loftq.lab.compare.store import Bytes, Row
from loftq.lab.compare.table import compare, markdown, summary_text

QLORA, LOFTQ = ("qlora", "nf2-g64", 4), ("loftq", "nf2-g64", 4)
TEXT = """# A comparison for tests.
model: org/model
tasks: [rte, wikitext2]
methods: [qlora, loftq, lora16]
formats: [nf2-g64]
ranks: [4]
seeds: 3
published:
  - source: a paper
    columns: {rte: accuracy, wikitext2: perplexity}
    rows:
      - {method: qlora, rte: 55.90, wikitext2: N.A.}
"""


def row(line: Any, seed: int, value: float | None, task: str = "rte", **more: Any) -> Row:
    """A row; no value = it diverged."""
    metric = {"rte": "accuracy", "wikitext2": "perplexity"}[task]
    method, format, rank = line
    named = method.replace(":", "_").replace("=", "_")
    stem = [word for word in (task, named, format, rank and f"r{rank}") if word]
    known = {
        "status": "diverged" if value is None else "done",
        "metrics": {} if value is None else {metric: value},
        "primary": None if value is None else metric,
        "greater_is_better": task == "rte",
        "bits_per_weight": 2.127,
        "bytes": Bytes(packed=2_000_000, dense=1_000_000, trained=500_000),
        "seconds": {"training": 60.0},
        "machine": {"device": "a GPU", "torch": "2.11", "commit": "", "date": "2026-01-01"},
    }
    return Row(
        cell="--".join([*stem, f"s{seed}"]), digest="x", task=task, method=method, format=format,
        rank=rank, seed=seed, **{**known, **more},
    )  # fmt: skip


def test_a_median_counts_runs_that_diverged_as_the_worst() -> None:
    two_of_three = summarise([row(QLORA, 0, 0.5), row(QLORA, 1, None), row(QLORA, 2, 0.7)])
    assert two_of_three[0].median == 0.5
    one_of_three = summarise([row(QLORA, 0, 0.5), row(QLORA, 1, None), row(QLORA, 2, None)])
    assert one_of_three[0].median is None
    assert summary_text(one_of_three[0]) == "N.A., n=3, 2 diverged"
    lower = summarise([row(QLORA, 0, 9.0, "wikitext2"), row(QLORA, 1, math.nan, "wikitext2")])
    assert (lower[0].diverged, lower[0].median) == (1, None)


def test_failures_are_neither_scores_nor_divergence() -> None:
    rows = [row(QLORA, 0, 0.5), row(QLORA, 1, None, status="failed")]
    (found,) = summarise(rows)
    assert (found.median, found.diverged, found.failed) == (0.5, 0, 1)
    assert summary_text(found) == "50.0, n=1, 1 failed"


def test_differences_pair_equal_seeds_and_know_what_is_better() -> None:
    up = [row(QLORA, s, v) for s, v in ((0, 0.5), (1, 0.6), (2, 0.7))]
    up += [row(LOFTQ, s, v) for s, v in ((2, 0.8), (0, 0.4), (3, 0.9))]
    (found,) = differences(summarise(up), QLORA)
    assert found.values == pytest.approx((-0.1, 0.1))  # seeds 0 and 2
    assert found.wins == 1
    down = [row(QLORA, 0, 9.0, "wikitext2"), row(LOFTQ, 0, 7.0, "wikitext2")]
    (found,) = differences(summarise(down), QLORA)
    assert found.values == (2.0,)


def test_the_table_says_it_all() -> None:
    rows = [row(line, s, v + s / 100) for line, v in ((QLORA, 0.5), (LOFTQ, 0.6)) for s in range(3)]
    rows += [row(LOFTQ, 0, 12.345, "wikitext2")]
    text = markdown(compare(read_recipe("test", TEXT), rows))
    lines = text.splitlines()
    head = "| method | format | rank | bits | MB | min | rte (accuracy) | wikitext2 (perplexity) |"
    assert head in lines
    qlora = (
        "| `qlora` | nf2-g64 | 4 | 2.13 | 3.5 | 3.0 | 51.0 (50.0 to 52.0), n=3 [55.90] | [N.A.] |"
    )
    assert qlora in lines
    assert (
        "| `loftq` | nf2-g64 | 4 | 2.13 | 3.5 | 4.0 | 61.0 (60.0 to 62.0), n=3 | 12.35, n=1 |"
        in lines
    )
    assert "| `lora16` | 16 bits | 4 |  |  |  |  |  |" in lines
    assert "| `loftq` | nf2-g64 | 4 | +10.0 (+10.0 to +10.0), 3/3 |  |" in lines
    assert "7 of 18 cells, 7 min 00 s of training and evaluation." in text
    assert "Machine: a GPU, torch 2.11, 2026-01-01 (7 cells)." in lines


def test_how_uncertain_one_run_is_by_its_examples_is_said() -> None:
    recipe = read_recipe("test", TEXT)
    spans = [(0.5, 0.6), (0.4, 0.6), (0.0, 1.0)]
    rows = [row(QLORA, seed, 0.55, interval=span) for seed, span in enumerate(spans)]
    told = "95 % of a single run for other examples of the kind (median of the runs): rte ±10.0."
    assert told in markdown(compare(recipe, rows))
    assert "single run" not in markdown(compare(recipe, [row(QLORA, 0, 0.55)]))


def test_the_arm_to_compare_with_can_be_chosen() -> None:
    rows = [row(QLORA, 0, 0.5), row(LOFTQ, 0, 0.6)]
    recipe = read_recipe("test", TEXT)
    (found,) = compare(recipe, rows, against="loftq").differences
    assert (found.line, found.values) == (QLORA, pytest.approx((-0.1,)))
    with pytest.raises(ValueError, match="no method 'loft' in this comparison"):
        compare(recipe, rows, against="loft")


def test_the_picture_shows_what_has_a_median(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    from loftq.lab.compare.picture import draw

    rows = [row(QLORA, s, 0.5 + s / 50) for s in range(3)] + [row(LOFTQ, 0, None)]
    path = draw(compare(read_recipe("test", TEXT), rows), tmp_path / "picture.svg")
    text = path.read_text()
    assert "accuracy (higher is better)" in text
    assert "qlora, nf2-g64, r = 4" in text
    assert draw(compare(read_recipe("test", TEXT), rows), path).read_text() == text


ALTERNATIONS = TEXT.replace(
    "[qlora, loftq, lora16]",
    "['loftq-paper:iters=0', 'loftq-paper:iters=1', 'loftq-paper:iters=5', lora16]",
)


def test_methods_that_differ_in_a_number_are_a_curve_over_it(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    from loftq.lab.compare.curves import curves_of
    from loftq.lab.compare.picture import draw

    recipe = read_recipe("test", ALTERNATIONS)
    lines = [(f"loftq-paper:iters={T}", "nf2-g64", 4) for T in (5, 0, 1)]
    rows = [
        row(line, s, 0.5 + 0.02 * i + 0.01 * s) for i, line in enumerate(lines) for s in range(3)
    ]
    rows.append(row(("lora16", None, 4), 0, 0.8))
    found = compare(recipe, rows)
    curves = curves_of(tuple(found.lines))
    assert curves is not None
    (points,) = curves.each.values()
    assert [value for value, _ in points] == [0, 1, 5]
    assert curves.others == (("lora16", None, 4),)
    text = draw(found, tmp_path / "picture.svg").read_text()
    assert "T, alternations" in text
    assert "loftq-paper, nf2-g64, r = 4" in text  # in the legend: it has points
    assert "stored, MB" not in text
    draw(found, tmp_path / "picture.png")
    assert curves_of((QLORA, LOFTQ, ("fast:iters=3", "nf2-g64", 4))) is None


@pytest.mark.parametrize(("collapsed", "axis"), [(5e5, "log"), (90.0, "linear")])
def test_perplexities_that_lie_far_apart_are_on_a_logarithmic_axis(
    collapsed: float, axis: str
) -> None:
    figure = pytest.importorskip("matplotlib.figure").Figure()
    from loftq.lab.compare.curves import name_scores

    axes = figure.subplots()
    axes.errorbar([0, 1], [collapsed, 20.0], yerr=[[1.0, 1.0], [1.0, 1.0]])
    name_scores(axes, "perplexity_gptq", up=False)
    assert (axes.get_yscale(), axes.get_ylabel()) == (axis, "perplexity_gptq (lower is better)")
